//! Finds the name that a misspelt one probably stands for.

/// Least similarity of two names, from 0 to 1, for one to be taken for a misspelling of the other.
/// `choosen` and `chosen` have 0.86, `reject` and `rejected` 0.75, `smolm2` and `smollm2` 0.86.
const MIN_SIMILARITY: f64 = 0.65;

/// Returns the candidate that is most similar to a misspelt name, if one is similar enough. Upper
/// and lower case are the same.
pub fn nearest<'a>(
    misspelt: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let misspelt = misspelt.to_lowercase();
    candidates
        .into_iter()
        .map(|name| {
            let similarity =
                strsim::normalized_damerau_levenshtein(&misspelt, &name.to_lowercase());
            (similarity, name)
        })
        .filter(|(similarity, _)| *similarity >= MIN_SIMILARITY)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_similar_name_is_meant_whatever_its_case() {
        let names = ["beta", "Rejected", "label_smoothing"];
        let meant = |misspelt| nearest(misspelt, names);
        assert_eq!(meant("bta"), Some("beta"));
        assert_eq!(meant("REJECT"), Some("Rejected"));
        assert_eq!(meant("label_smooting"), Some("label_smoothing"));
        assert_eq!(meant("gamma"), None);
    }
}
