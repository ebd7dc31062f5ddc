//! `bradley evaluate`: reports how well a policy's scores agree with a dataset.

mod plots;
mod report;

use super::args::{EvaluateArgs, Output};
use super::failure::{Failure, Outcome, unless_interrupted};
use super::job_rows::{JobRows, RowLimits};
use super::policy_names::{PolicyNames, same_model_warning};
use super::progress::{self, WorkProgress, say, warn};
use super::remote::connect;
use super::{output, short_names};
use crate::rpc::canonical::FieldSelection;
use crate::rpc::client::Client;
use crate::rpc::pb::{self, evaluate_policy_response::Part};

pub(super) async fn run(args: EvaluateArgs, output: Output) -> Outcome {
    let mut request = request(&args)?;
    let client = connect(&args.server.target()).await?;
    let names = PolicyNames::of(&client).await?;
    let options = request.options.get_or_insert_default();
    names.complete_options(options).await?;
    if let Some(warning) = same_model_warning(&options.policy, &options.reference) {
        warn(&warning);
    }
    // With this format at most a warning about left-out rows is printed. The report counts the
    // rows.
    let mut rows = JobRows::new(&client, Output::Json);
    let evaluating = evaluate(&client, &args, request, &mut rows);
    let evaluated = unless_interrupted("interrupted", evaluating).await;
    if let Some(remaining) = rows.remove_uploads().await {
        warn(&remaining);
    }
    let evaluated = evaluated?;
    finish(&args, output, &evaluated)
}

/// Returns the request, so far with the names of policy and reference as they were given, and
/// without a dataset.
fn request(args: &EvaluateArgs) -> Result<pb::EvaluatePolicyRequest, Failure> {
    let (chosen, rejected) = match args.score_columns.as_deref().map(|s| s.split_once(',')) {
        None => ("", ""),
        Some(Some((chosen, rejected))) if !chosen.is_empty() && !rejected.is_empty() => {
            (chosen, rejected)
        }
        Some(_) => {
            return Err(Failure::Usage(
                "--score-columns names two columns: --score-columns CHOSEN,REJECTED".into(),
            ));
        }
    };
    Ok(pb::EvaluatePolicyRequest {
        options: Some(args.scoring.options()?),
        dataset: String::new(),
        subset_column: args.subset_column.clone().unwrap_or_default(),
        chosen_score_column: chosen.to_owned(),
        rejected_score_column: rejected.to_owned(),
        bins: args.bins,
        save_calibration: args.save_calibration,
    })
}

/// Uploads the files, unless the server has their rows already, and evaluates the policy.
async fn evaluate(
    client: &Client,
    args: &EvaluateArgs,
    mut request: pb::EvaluatePolicyRequest,
    rows: &mut JobRows,
) -> Result<pb::EvaluationReport, Failure> {
    request.dataset = match &args.dataset {
        Some(name) => short_names::dataset(client, name).await?,
        None => {
            let data = progress::find(&args.data, &args.reading).await?;
            // Rows that cannot be used are in the report.
            rows.dataset(&data, &RowLimits::default(), true).await?
        }
    };
    evaluate_dataset(client, request, "evaluating").await
}

/// Evaluates a policy on a dataset of the server and shows the progress as that of `what`.
///
/// # Errors
/// Returns a failure if the server refuses the call or ends it without a report.
pub(super) async fn evaluate_dataset(
    client: &Client,
    request: pb::EvaluatePolicyRequest,
    what: &str,
) -> Result<pb::EvaluationReport, Failure> {
    let progress = WorkProgress::pairs(what);
    let receive = async {
        let mut messages = client
            .evaluations()
            .evaluate_policy(request)
            .await?
            .into_inner();
        while let Some(message) = messages.message().await? {
            match message.part {
                Some(Part::Progress(p)) => {
                    let done = p.scored_pairs + p.failed_pairs;
                    progress.set_total(p.total_pairs.max(done));
                    progress.set(done);
                }
                Some(Part::Report(report)) => {
                    progress.set(report.pairs + report.failed_pairs);
                    return Ok(report);
                }
                None => {}
            }
        }
        Err(Failure::Failed(
            "the server ended the evaluation without a report".into(),
        ))
    };
    let report = progress.during(receive).await?;
    let rate = progress.summary();
    drop(progress);
    if let Some(rate) = rate {
        say(&rate);
    }
    Ok(report)
}

/// Prints the report and writes the plots.
fn finish(args: &EvaluateArgs, format: Output, report: &pb::EvaluationReport) -> Outcome {
    for warning in &report.warnings {
        warn(warning);
    }
    match format {
        Output::Table => {
            let mut shown = report.clone();
            if args.dataset.is_none() {
                // An upload is deleted, and the caller knows the files.
                shown.dataset = args.data.join(", ");
            }
            output::line(&report::tables(&shown));
        }
        other => output::resource(other, &output::message(report, FieldSelection::Set)?),
    }
    if let Some(folder) = &args.plots {
        for file in plots::write(folder, report)? {
            say(&format!("written: {}", file.display()));
        }
    }
    if let Some(calibration) = &report.calibration
        && args.save_calibration
        && !calibration.saved
    {
        return Err(Failure::Failed(format!(
            "no calibration was saved: {}",
            calibration.problem
        )));
    }
    if report.failed_pairs == 0 {
        return Ok(());
    }
    for line in report::errors(report) {
        say(&line);
    }
    failed_pairs(report, args.skip_bad_rows)
}

/// Returns the outcome of a report with pairs that have no score.
fn failed_pairs(report: &pb::EvaluationReport, skips_bad_rows: bool) -> Outcome {
    let (failed, all) = (report.failed_pairs, report.pairs + report.failed_pairs);
    if report.pairs == 0 {
        return Err(Failure::Failed(format!(
            "{failed} of {all} pairs could not be scored: correct them, because --skip-bad-rows \
             needs at least one pair with a score"
        )));
    }
    if !skips_bad_rows {
        return Err(Failure::Failed(format!(
            "{failed} of {all} pairs could not be scored: correct them, or skip them with \
             --skip-bad-rows"
        )));
    }
    warn(&format!("{failed} of {all} pairs were skipped"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_without_a_score_are_skipped_unless_no_pair_has_one() {
        let said = |pairs, skips_bad_rows| {
            let report = pb::EvaluationReport {
                pairs,
                failed_pairs: 2,
                ..Default::default()
            };
            let failure = failed_pairs(&report, skips_bad_rows).err();
            failure.map(|failure| failure.message().to_owned())
        };
        assert_eq!(said(3, true), None);
        let refused = said(3, false).unwrap_or_default();
        assert!(refused.contains("2 of 5 pairs could not"), "{refused}");
        assert!(refused.contains("skip them with"), "{refused}");
        // Skipping them would leave no pair.
        for skips_bad_rows in [true, false] {
            let refused = said(0, skips_bad_rows).unwrap_or_default();
            assert!(refused.contains("2 of 2 pairs could not"), "{refused}");
            assert!(!refused.contains("skip them with"), "{refused}");
        }
    }
}
