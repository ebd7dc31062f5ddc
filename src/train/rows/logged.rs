//! Reads the columns with log-probs of a row. An unusable value is kept as such, because the row is
//! refused only by those who need the log-probs.

use serde_json::{Map, Value};

use crate::domain::dataset::MAX_QUOTED_VALUE;
use crate::domain::logged::{
    LoggedLogprobs, LoggedProblem, LoggedSums, POLICY_COLUMNS, REFERENCE_COLUMNS, sum_problem,
};
use crate::domain::violation::shortened;

/// Columns with the log-probs of the chosen, and of the rejected answers. In a row with several
/// answers each column has a list with a value for each answer.
const SIDE_COLUMNS: [[&str; 2]; 2] = [
    [REFERENCE_COLUMNS[0], POLICY_COLUMNS[0]],
    [REFERENCE_COLUMNS[1], POLICY_COLUMNS[1]],
];

/// Reads the log-probs among a row's columns.
pub(super) fn logged(fields: &Map<String, Value>) -> LoggedLogprobs {
    LoggedLogprobs {
        reference: sums(fields, REFERENCE_COLUMNS),
        policy: sums(fields, POLICY_COLUMNS),
    }
}

fn sums(fields: &Map<String, Value>, columns: [&str; 2]) -> LoggedSums {
    let given = columns.map(|column| fields.get(column).filter(|value| !value.is_null()));
    let unusable = |column: &str, problem: String| {
        LoggedSums::Unusable(LoggedProblem {
            column: column.to_owned(),
            message: format!("{column} {problem}"),
        })
    };
    let [a, b] = match (given, columns) {
        ([None, None], _) => return LoggedSums::Absent,
        ([Some(_), None], [there, missing]) | ([None, Some(_)], [missing, there]) => {
            let problem = format!("is missing, but the row has {there}: give both or none");
            return unusable(missing, problem);
        }
        ([Some(a), Some(b)], _) => [a, b],
    };
    match (number(a), number(b)) {
        (Ok(a), Ok(b)) => LoggedSums::Given([a, b]),
        (Err(problem), _) => unusable(columns[0], problem),
        (_, Err(problem)) => unusable(columns[1], problem),
    }
}

fn number(value: &Value) -> Result<f64, String> {
    let Some(sum) = value.as_f64() else {
        let quoted = shortened(&value.to_string(), MAX_QUOTED_VALUE);
        return Err(format!(
            "is {quoted}: it must be one number for the answer, the sum over its tokens (with \
             several rejected answers, a list with one number for each)"
        ));
    };
    match sum_problem(sum) {
        Some(problem) => Err(problem),
        None => Ok(sum),
    }
}

/// Logged log-probs of a row with several answers: columns and values of the chosen answers, and of
/// the rejected ones.
pub(super) struct LoggedOfAnswers([Vec<(&'static str, Vec<Value>)>; 2]);

impl LoggedOfAnswers {
    /// Takes the columns that have a value for each of `counts` chosen and rejected answers. A
    /// single value for several answers belongs to none of them and becomes a list, which is
    /// reported later.
    pub(super) fn take(fields: &mut Map<String, Value>, counts: [usize; 2]) -> Self {
        let mut taken = [Vec::new(), Vec::new()];
        for side in 0..2 {
            for column in SIDE_COLUMNS[side] {
                match fields.remove(column) {
                    Some(Value::Array(values)) if values.len() == counts[side] => {
                        taken[side].push((column, values));
                    }
                    Some(value) if counts[side] > 1 && value.is_number() => {
                        fields.insert(column.to_owned(), Value::Array(vec![value]));
                    }
                    Some(value) => {
                        fields.insert(column.to_owned(), value);
                    }
                    None => {}
                }
            }
        }
        LoggedOfAnswers(taken)
    }

    /// Adds the values of the chosen and the rejected answer with the indices `places` to their
    /// pair's columns.
    pub(super) fn add(&self, places: [usize; 2], fields: &mut Map<String, Value>) {
        for (columns, place) in self.0.iter().zip(places) {
            for (column, values) in columns {
                if let Some(value) = values.get(place) {
                    fields.insert((*column).to_owned(), value.clone());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(row: Value) -> LoggedLogprobs {
        logged(row.as_object().unwrap())
    }

    #[test]
    fn both_columns_or_none_and_only_log_probs() {
        let both = read(json!({"ref_chosen_logps": -1.5, "ref_rejected_logps": 0}));
        assert_eq!(both.of_reference(), Ok([-1.5, 0.0]));
        assert_eq!(both.policy, LoggedSums::Absent);
        assert!(read(json!({"ref_chosen_logps": null})).is_absent());
        let cases = [
            (
                json!({"ref_chosen_logps": -1}),
                "ref_rejected_logps is missing",
            ),
            (
                json!({"ref_rejected_logps": -1}),
                "ref_chosen_logps is missing",
            ),
            (
                json!({"ref_chosen_logps": 0.5, "ref_rejected_logps": -1}),
                "ref_chosen_logps is 0.5: a log-prob is a finite number, at most 0",
            ),
            (
                json!({"ref_chosen_logps": -1, "ref_rejected_logps": [-1, -2]}),
                "ref_rejected_logps is [-1,-2]: it must be one number",
            ),
            (
                json!({"ref_chosen_logps": "NaN", "ref_rejected_logps": -1}),
                "ref_chosen_logps is \"NaN\": it must be one number",
            ),
            (
                json!({}),
                "ref_chosen_logps and ref_rejected_logps are missing",
            ),
        ];
        for (row, expected) in cases {
            let problem = read(row).of_reference().unwrap_err();
            assert!(problem.message.starts_with(expected), "{problem:?}");
            assert!(problem.message.starts_with(&problem.column), "{problem:?}");
        }
        let policy = read(json!({"chosen_logps": -2, "rejected_logps": -3}));
        assert_eq!(policy.of_policy(), Ok([-2.0, -3.0]));
        assert!(policy.of_reference().is_err() && policy.problems().next().is_none());
    }

    #[test]
    fn each_of_several_rejected_answers_has_its_own_value() {
        let mut row = json!({"ref_chosen_logps": -1, "ref_rejected_logps": [-2, -3]});
        let fields = row.as_object_mut().unwrap();
        let several = LoggedOfAnswers::take(fields, [1, 2]);
        for (place, sum) in [(0, -2.0), (1, -3.0)] {
            let mut pair = fields.clone();
            several.add([0, place], &mut pair);
            assert_eq!(logged(&pair).of_reference(), Ok([-1.0, sum]));
        }
        let mut row = json!({"ref_chosen_logps": [-1, -4], "ref_rejected_logps": [-2, -3]});
        let fields = row.as_object_mut().unwrap();
        LoggedOfAnswers::take(fields, [2, 2]).add([1, 0], fields);
        assert_eq!(logged(fields).of_reference(), Ok([-4.0, -2.0]));
        // One value for two answers, and two for three.
        for (value, count) in [(json!(-2), 2), (json!([-2, -3]), 3)] {
            let mut row = json!({"ref_chosen_logps": -1, "ref_rejected_logps": value});
            let fields = row.as_object_mut().unwrap();
            LoggedOfAnswers::take(fields, [1, count]).add([0, 0], fields);
            let problem = logged(fields).of_reference().unwrap_err();
            assert_eq!(problem.column, "ref_rejected_logps");
        }
    }
}
