//! Parsers of flags that are whole numbers. Their errors say what is allowed, which those of the
//! standard library do not.

use std::num::IntErrorKind;

/// Parses a whole number of at least `LEAST`, for flags whose highest value has no meaning.
///
/// # Errors
/// Returns what is allowed.
pub(super) fn whole_from<const LEAST: u32>(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number >= LEAST => Ok(number),
        Err(e) if *e.kind() == IntErrorKind::PosOverflow => {
            Err(format!("it must be at most {}", u32::MAX))
        }
        _ => Err(format!("it must be a whole number, at least {LEAST}")),
    }
}

/// Parses a whole number of up to 64 bits, such as a seed.
///
/// # Errors
/// Returns what is allowed.
pub(super) fn whole_number(text: &str) -> Result<u64, String> {
    let expected = || format!("it must be a whole number from 0 to {}", u64::MAX);
    text.parse().map_err(|_| expected())
}

/// Parses a whole number that a `usize` can hold, such as a number of threads.
///
/// # Errors
/// Returns what is allowed.
pub(super) fn whole_size(text: &str) -> Result<usize, String> {
    whole_number(text).and_then(|n| usize::try_from(n).map_err(|e| e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_is_allowed() {
        assert_eq!(whole_from::<1>("1"), Ok(1));
        assert_eq!(whole_from::<0>("0"), Ok(0));
        for text in ["0", "-3", "", "1.5"] {
            let said = whole_from::<1>(text).unwrap_err();
            assert_eq!(said, "it must be a whole number, at least 1");
        }
        let said = whole_from::<1>("4294967296").unwrap_err();
        assert_eq!(said, "it must be at most 4294967295");
        let said = whole_size("-1").unwrap_err();
        assert_eq!(said, whole_number("x").unwrap_err());
    }
}
