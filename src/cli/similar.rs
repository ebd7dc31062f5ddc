//! Finds the name that a misspelt one probably stands for.

/// Least similarity, from 0 to 1, of a word to the one that was probably meant.
const SIMILAR: f64 = 0.7;

/// Returns the name that is most similar to a misspelt one, if one is similar enough.
pub fn nearest<'a>(misspelt: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| (strsim::normalized_damerau_levenshtein(misspelt, name), name))
        .filter(|(similarity, _)| *similarity >= SIMILAR)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}
