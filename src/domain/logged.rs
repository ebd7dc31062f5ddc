//! Log-probs that rows carry because another tool has computed them, e.g. TRL with
//! `precompute_ref_log_probs`.

use serde::{Deserialize, Serialize};

/// Columns with Σ log π_ref of the chosen and of the rejected answer, named as in TRL.
pub const REFERENCE_COLUMNS: [&str; 2] = ["ref_chosen_logps", "ref_rejected_logps"];
/// Columns with Σ log π_θ of the chosen and of the rejected answer, named as in TRL.
pub const POLICY_COLUMNS: [&str; 2] = ["chosen_logps", "rejected_logps"];
/// Name of a job's reference whose log-probs are in its rows.
pub const LOGGED_REFERENCE: &str = "logged";

/// Returns true if a column holds log-probs.
pub fn is_logged_column(column: &str) -> bool {
    REFERENCE_COLUMNS.contains(&column) || POLICY_COLUMNS.contains(&column)
}

/// Returns the reason why a number cannot be the log-prob of a text, `None` if it can.
pub fn sum_problem(sum: f64) -> Option<String> {
    let is_logprob = sum.is_finite() && sum <= 0.0;
    (!is_logprob).then(|| format!("is {sum}: a log-prob is a finite number, at most 0"))
}

/// Log-probs of a row's two answers under reference and policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoggedLogprobs {
    /// Those of [`REFERENCE_COLUMNS`].
    pub reference: LoggedSums,
    /// Those of [`POLICY_COLUMNS`].
    pub policy: LoggedSums,
}

/// Two columns with the log-probs of the chosen and of the rejected answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoggedSums {
    /// The row has neither of them.
    #[default]
    Absent,
    /// Log-probs in nats, each summed over the answer's tokens.
    Given([f64; 2]),
    /// One is missing, or holds something else. Only those who need the log-probs refuse the row.
    Unusable(LoggedProblem),
}

/// Problem of a column with log-probs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedProblem {
    /// Name of the column.
    pub column: String,
    /// Explanation with the remedy. It begins with the column.
    pub message: String,
}

impl LoggedLogprobs {
    /// Returns true if the row has none of the columns.
    pub fn is_absent(&self) -> bool {
        self.reference == LoggedSums::Absent && self.policy == LoggedSums::Absent
    }

    /// Returns Σ log π_ref of the chosen and of the rejected answer.
    ///
    /// # Errors
    /// Returns the column that is missing or unusable.
    pub fn of_reference(&self) -> Result<[f64; 2], LoggedProblem> {
        self.reference.given(REFERENCE_COLUMNS)
    }

    /// Returns Σ log π_θ of the chosen and of the rejected answer.
    ///
    /// # Errors
    /// Returns the column that is missing or unusable.
    pub fn of_policy(&self) -> Result<[f64; 2], LoggedProblem> {
        self.policy.given(POLICY_COLUMNS)
    }

    /// Returns the problems of columns that the row has.
    pub fn problems(&self) -> impl Iterator<Item = &LoggedProblem> {
        [&self.reference, &self.policy]
            .into_iter()
            .filter_map(|sums| match sums {
                LoggedSums::Unusable(problem) => Some(problem),
                _ => None,
            })
    }
}

impl LoggedSums {
    fn given(&self, columns: [&str; 2]) -> Result<[f64; 2], LoggedProblem> {
        match self {
            LoggedSums::Given(sums) => Ok(*sums),
            LoggedSums::Unusable(problem) => Err(problem.clone()),
            LoggedSums::Absent => {
                let [column, other] = columns;
                Err(LoggedProblem {
                    column: column.to_owned(),
                    message: format!(
                        "{column} and {other} are missing: add the log-probs of the answers, each \
                         summed over the answer's tokens"
                    ),
                })
            }
        }
    }
}

/// Treatment of a row whose logged reference log-probs differ from those that the model gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoggedCheck {
    /// The job fails.
    #[default]
    Fail,
    /// The job logs a warning and goes on.
    Warn,
}

impl LoggedCheck {
    /// Returns the check with this name, `fail` or `warn`.
    pub fn parse(name: &str) -> Option<Self> {
        [LoggedCheck::Fail, LoggedCheck::Warn]
            .into_iter()
            .find(|check| check.name() == name)
    }

    /// Returns `fail` or `warn`.
    pub fn name(self) -> &'static str {
        match self {
            LoggedCheck::Fail => "fail",
            LoggedCheck::Warn => "warn",
        }
    }
}
