//! `bradley rounds`: improves a policy in rounds (bootstrapping with implicit rewards, arXiv
//! 2406.09760).
//!
//! ```text
//! prompts ─▶ pairs of own answers ─▶ training ─▶ comparison ─▶ next round
//! ```
//!
//! Everything that is done is in a folder, so that the same command continues after an
//! interruption, to the same pairs.

mod compare;
mod folder;
mod held_out;
mod report;
mod training;

use std::sync::Arc;

use serde_json::Value;

use self::compare::compare;
use self::folder::{RunFolder, RunHeader};
use self::held_out::{EvalUpload, of_eval_data};
use self::report::{ComparisonSummary, HeldOutPairs, RoundPairs, RoundReport};
use self::training::{RoundTemplate, RoundToTrain, RoundTrainer};
use super::args::{DataArgs, Output, PairMakingArgs, RoundsArgs};
use super::data::DataFiles;
use super::evaluate::evaluate_dataset;
use super::failure::{Failure, Outcome, unless_interrupted};
use super::generate::{PromptRow, read, request};
use super::output;
use super::pairs::{self, PairMaker, PairPolicies, RESULT_COLUMNS, differing};
use super::policy_names::{PolicyNames, same_model_warning};
use super::progress::{self, say, warn};
use super::remote::{connect, server_flag};
use super::short_names::with_earlier_last;
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Number of hexadecimal digits of the id of a run. The last ones of a UUID are random.
const ID_DIGITS: usize = 12;
/// Setting that may still change while no job was created with it.
const TRAINING_SETTINGS: &str = "--file";

pub(super) async fn run(mut args: RoundsArgs, format: Output) -> Outcome {
    let earlier = RunFolder::stored_header(&args.out)?.map(|header| header.settings);
    if let Some(earlier) = &earlier {
        keep_last(&mut args.making, earlier);
    }
    let making = &args.making;
    let base = request(&making.form, &making.sampling, making.samples)?;
    check_standard_input(&args)?;
    let mut template = RoundTemplate::read(args.file.as_deref())?;
    let client = connect(&args.server.target()).await?;
    let names = PolicyNames::of(&client).await?;
    let given = PairPolicies::complete(&names, making).await?;
    if same_model_warning(given.judge(), &given.reference).is_some() {
        return Err(Failure::Usage(format!(
            "{} is its own reference, so that all its rewards are 0 and there are no pairs: name a \
             trained policy with --judge, or another model with --reference",
            given.judge()
        )));
    }
    let earlier = earlier.as_ref().map(|settings| &settings["file"]);
    template.complete(&client, &names, earlier).await?;
    let data = progress::find(&making.data, &making.reading).await?;
    let title = data.title();
    let prompts = read(&data, &making.form, &RESULT_COLUMNS)?;
    let eval_data = find_eval_data(&args).await?;
    let eval_hash = eval_data.bytes_hash().await.map_err(of_eval_data)?;
    let maker = PairMaker::new(&client, making, base.clone(), given.clone(), 0);
    let mut settings = maker.settings(&prompts);
    settings["judge"] = given.judge.clone().into();
    settings["eval_data"] = eval_hash.as_str().into();
    settings["compare_prompts"] = args.compare_prompts.into();
    settings["file"] = template.settings()?;
    let folder = RunFolder::open(&args.out)?;
    let header = header(&client, &folder, given, settings).await?;
    if folder.training(1)?.is_none() {
        template.check(&client, &header.policy).await?;
    }
    let eval_upload = EvalUpload::new(&client, &header.run, eval_data, eval_hash);
    let mut rounds = RoundsInProgress {
        args: &args,
        base,
        prompts,
        title,
        header,
        folder,
        trainer: RoundTrainer {
            client: client.clone(),
            server_flag: server_flag(&args.server),
            template,
            running: None,
        },
        eval_upload,
        client,
    };
    let interrupted = "interrupted; the same command continues";
    let worked = unless_interrupted(interrupted, rounds.work()).await;
    let worked = worked.map_err(|failure| rounds.with_running_job(failure));
    let RoundsInProgress {
        header,
        eval_upload,
        ..
    } = rounds;
    if let Some(remaining) = eval_upload.remove().await {
        warn(&remaining);
    }
    let reports = worked?;
    match format {
        Output::Table => output::line(&report::text(&reports)),
        Output::Csv => output::list(format, &[], Vec::new(), report::rows(&reports)?),
        format => output::resource(format, &report::document(&header.run, &reports)?),
    }
    Ok(())
}

/// Lets `@last` name the job that it named when the run began. The jobs of the run are newer.
fn keep_last(making: &mut PairMakingArgs, earlier: &Value) {
    let keep = |name: &mut String, setting: &str| {
        *name = with_earlier_last(name, earlier[setting].as_str());
    };
    keep(&mut making.policy, "policy");
    if let Some(judge) = &mut making.judge {
        keep(judge, "judge");
    }
    if let Some(reference) = &mut making.reference {
        keep(reference, "reference");
    }
}

/// Checks that at most one of the files is the standard input.
fn check_standard_input(args: &RoundsArgs) -> Outcome {
    let is_job_piped = args.file.as_ref().is_some_and(|f| f.as_os_str() == "-");
    let piped = args.making.data.iter().filter(|file| *file == "-").count();
    match usize::from(is_job_piped) + piped > 1 {
        true => Err(Failure::Usage(
            "- stands for the standard input and can be named once in --file (-f) and --data"
                .to_owned(),
        )),
        false => Ok(()),
    }
}

/// Finds the files of `--eval-data`. They are read in every round, and by the next start.
async fn find_eval_data(args: &RoundsArgs) -> Result<DataFiles, Failure> {
    let reading = DataArgs {
        columns: args.eval_columns.clone(),
    };
    let found = progress::find(&args.eval_data, &reading).await;
    let found = found.map_err(of_eval_data)?;
    match found.is_rereadable() {
        true => Ok(found),
        false => Err(Failure::Usage(
            "--eval-data is read in every round, and standard input and pipes can be read once: \
             write the pairs to a file first"
                .to_owned(),
        )),
    }
}

/// Begins a run in a folder, or continues the one that the folder has. As long as no prompt has an
/// outcome, other settings begin the run anew.
async fn header(
    client: &Client,
    folder: &RunFolder,
    given: PairPolicies,
    settings: Value,
) -> Result<RunHeader, Failure> {
    let has_changed = |stored: &RunHeader| !differing(&stored.settings, &settings).is_empty();
    let stored = match folder.header()? {
        Some(stored) if has_changed(&stored) && !folder.has_outcomes()? => None,
        stored => stored,
    };
    let Some(mut header) = stored else {
        let judge = match given.judge {
            Some(judge) => Some(pinned(client, judge).await?),
            None => None,
        };
        let id = uuid::Uuid::now_v7().simple().to_string();
        let seed = settings["seed"].as_u64();
        let header = RunHeader {
            run: id.chars().skip(id.len() - ID_DIGITS).collect(),
            seed: seed.unwrap_or_else(rand::random),
            policy: pinned(client, given.policy).await?,
            judge,
            reference: pinned(client, given.reference).await?,
            settings,
        };
        folder.store_header(&header)?;
        return Ok(header);
    };
    let differing = differing(&header.settings, &settings);
    if differing.is_empty() {
        return Ok(header);
    }
    if differing == [TRAINING_SETTINGS] && folder.training(1)?.is_none() {
        header.settings["file"] = settings["file"].clone();
        folder.store_header(&header)?;
        return Ok(header);
    }
    Err(Failure::Usage(format!(
        "{} is of a run with another value of {}: give the same flags and prompts to continue it, \
         or name another folder with --out",
        folder.path().display(),
        // Its short form may be what the caller typed.
        differing
            .join(", ")
            .replace(TRAINING_SETTINGS, "--file (-f)")
    )))
}

/// Returns a name that always means the same weights: that of the step which `latest` and `best`
/// mean now.
async fn pinned(client: &Client, name: String) -> Result<String, Failure> {
    let step = name.split_once("/checkpoints/").map(|(_, step)| step);
    if !matches!(step, Some("latest" | "best")) {
        return Ok(name);
    }
    let context = name.clone();
    let request = pb::GetCheckpointRequest { name };
    match client.checkpoints().get_checkpoint(request).await {
        Ok(checkpoint) => Ok(checkpoint.into_inner().name),
        Err(status) => Err(Failure::from(status).with_context(&context)),
    }
}

/// A run in progress.
struct RoundsInProgress<'a> {
    args: &'a RoundsArgs,
    client: Client,
    /// The request of a prompt, without it, the policy and the seed of the round.
    base: pb::GenerateCompletionsRequest,
    prompts: Vec<PromptRow>,
    /// Name of the files of prompts.
    title: String,
    header: RunHeader,
    folder: RunFolder,
    trainer: RoundTrainer,
    eval_upload: EvalUpload,
}

impl RoundsInProgress<'_> {
    /// Does the rounds that earlier starts have not finished, and returns the reports of all.
    async fn work(&mut self) -> Result<Vec<RoundReport>, Failure> {
        let mut reports: Vec<RoundReport> = Vec::new();
        let mut policy = self.header.policy.clone();
        for number in 1..=self.args.rounds {
            let report = match self.folder.report::<RoundReport>(number)? {
                Some(report) => report,
                None => self.round(number, &policy).await?,
            };
            policy.clone_from(&report.new_policy);
            reports.push(report);
        }
        Ok(reports)
    }

    /// Does a round, or what is left of it.
    async fn round(&mut self, number: u32, policy: &str) -> Result<RoundReport, Failure> {
        let what = format!("round {number} of {}", self.args.rounds);
        self.folder.create_round(number)?;
        let file = self.folder.pairs(number);
        if !self.folder.has_pairs(number) {
            // A line of a terminal has 80 columns, most of which the bar takes.
            let making = format!("{what}: pairs");
            let names = (self.title.as_str(), making.as_str());
            let maker = self.maker(number, policy);
            let made = pairs::make(&maker, names, self.prompts.clone(), &file).await?;
            output::say_wrapped(&format!("{what}: {}", made.sentence()));
        }
        let pairs = RoundPairs::read(&file)?;
        if pairs.pairs == 0 {
            return Err(Failure::Failed(format!(
                "{what} has no pairs to train on: lower --min-margin, raise --samples or \
                 --temperature, add --keep-cut if --max-tokens cuts the answers off, raise \
                 --max-length if they are too long for the judge, or name another --judge, and \
                 begin in another folder"
            )));
        }
        let round = RoundToTrain {
            run: &self.header.run,
            number,
            what: &what,
            policy,
        };
        let files = [file.to_string_lossy().into_owned()];
        let data = DataFiles::find(&files, &DataArgs::default()).await?;
        let new_policy = self.trainer.train(&self.folder, &round, &data).await?;
        say(&format!("{what}: the new policy is {new_policy}"));
        let first = self.args.compare_prompts as usize;
        let first = self.prompts.get(..first).unwrap_or(&self.prompts);
        let names = (self.title.as_str(), what.as_str());
        // A new one, because the server may have had no prompt to answer for long.
        let maker = self.maker(number, policy);
        let answers = compare(&maker, names, first, (policy, new_policy.as_str())).await?;
        self.folder.store_answers(number, &answers)?;
        let summary = ComparisonSummary::of(&answers);
        let report = RoundReport {
            round: number,
            policy: policy.to_owned(),
            prompts: self.prompts.len(),
            pairs,
            compared: summary.compared,
            not_compared: summary.not_compared,
            win_rate: summary.win_rate,
            mean_tokens_before: summary.mean_tokens_before,
            mean_tokens_after: summary.mean_tokens_after,
            held_out: self.held_out(&new_policy, &what).await?,
            samples: summary.samples,
            new_policy,
        };
        self.folder.store_report(number, &report)?;
        Ok(report)
    }

    /// Returns what makes the pairs of a round, and compares its answers.
    fn maker(&self, number: u32, policy: &str) -> Arc<PairMaker> {
        let policies = PairPolicies {
            policy: policy.to_owned(),
            judge: self.header.judge.clone(),
            reference: self.header.reference.clone(),
        };
        let request = pb::GenerateCompletionsRequest {
            seed: Some(self.seed(number)),
            ..self.base.clone()
        };
        let (making, timeout) = (&self.args.making, self.args.retries.retry_timeout);
        PairMaker::new(&self.client, making, request, policies, timeout)
    }

    /// Returns the seed of the first prompt of a round. The seeds of two rounds do not overlap.
    fn seed(&self, number: u32) -> u64 {
        let last = self.prompts.last().map_or(0, |prompt| prompt.row);
        let before = u64::from(number.saturating_sub(1)).wrapping_mul(last);
        self.header.seed.wrapping_add(before)
    }

    /// Evaluates a new policy against the first one of the run on the pairs of `--eval-data`.
    async fn held_out(
        &mut self,
        policy: &str,
        what: &str,
    ) -> Result<Option<HeldOutPairs>, Failure> {
        if self.eval_upload.is_empty() {
            return Ok(None);
        }
        let dataset = self.eval_upload.dataset().await?;
        let request = pb::EvaluatePolicyRequest {
            options: Some(pb::ScoringOptions {
                policy: policy.to_owned(),
                reference: self.header.policy.clone(),
                ..Default::default()
            }),
            dataset,
            ..Default::default()
        };
        let evaluating = format!("{what}: evaluating");
        let report = evaluate_dataset(&self.client, request, &evaluating).await?;
        if report.failed_pairs > 0 {
            let all = report.pairs + report.failed_pairs;
            let failed = report.failed_pairs;
            warn(&format!(
                "{failed} of {all} pairs of --eval-data could not be scored"
            ));
        }
        Ok(report.accuracy.map(|accuracy| HeldOutPairs {
            pairs: accuracy.count,
            accuracy: accuracy.share,
        }))
    }

    /// Adds to an interruption that the job of the round goes on.
    fn with_running_job(&self, failure: Failure) -> Failure {
        let is_interrupted = matches!(failure, Failure::Interrupted(_));
        let Some(job) = self.trainer.running.as_ref().filter(|_| is_interrupted) else {
            return failure;
        };
        let flag = &self.trainer.server_flag;
        failure.with_remark(&format!(
            "the job goes on; to end it: bradley jobs cancel {job}{flag}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_settings_of_the_training_are_those_of_the_job_file() {
        let old = json!({"file": {"seed": 1}, "min_margin": 0.1, "seed": null});
        let new = json!({"file": {"seed": 2}, "min_margin": 0.1, "seed": null});
        assert_eq!(differing(&old, &new), [TRAINING_SETTINGS]);
    }
}
