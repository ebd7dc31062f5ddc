//! Names as people give them: whole, without the collection, the beginning of an ID as in git, or
//! `@last`.

use super::failure::Failure;
use super::remote::full_name;
use crate::domain::names::is_valid_id;
use crate::domain::similar::nearest;
use crate::rpc::client::{Client, is_denied};
use crate::rpc::pb;

/// The caller's newest resource of a collection.
pub(super) const LAST: &str = "@last";
/// Part of a checkpoint's name between its job and its step.
const CHECKPOINTS: &str = "/checkpoints/";
/// Minimum number of characters of the beginning of an ID, as in git.
const MIN_PREFIX: usize = 4;
/// Number of characters of a whole ID, a UUID.
const WHOLE_ID: usize = 36;
/// Maximum number of candidates that an error names.
const MAX_NAMED: usize = 8;
/// Maximum size of a page.
const PAGE_SIZE: i32 = 1000;
/// Maximum number of pages of a list. A server that sends more probably repeats its pages.
const MAX_PAGES: usize = 10_000;

/// Collection of jobs in names.
pub(super) const JOBS: &str = "trainingJobs";
/// Collection of datasets in names.
pub(super) const DATASETS: &str = "datasets";
/// Collection of base models in names.
pub(super) const MODELS: &str = "models";

/// Choice of jobs for a list.
#[derive(Debug, Default)]
pub(super) struct JobChoice {
    /// Only jobs in one of these states. Empty: in any state.
    pub states: Vec<pb::JobState>,
    /// Only jobs with all of these labels.
    pub labels: Vec<(String, String)>,
    /// Maximum number of jobs, at least 1.
    pub limit: Option<usize>,
    /// Only the caller's own jobs, also for administrators.
    pub own: bool,
}

impl JobChoice {
    fn has_labels_of(&self, job: &pb::TrainingJob) -> bool {
        let has = |(key, value): &(String, String)| job.labels.get(key) == Some(value);
        self.labels.iter().all(has)
    }

    /// Returns the size of a page. The server does not choose by labels, so that a list with labels
    /// has whole pages.
    fn page_size(&self) -> i32 {
        match self.limit.map(i32::try_from) {
            Some(Ok(limit)) if self.labels.is_empty() => limit.min(PAGE_SIZE),
            _ => PAGE_SIZE,
        }
    }
}

/// Returns every job, newest first.
pub(super) async fn all_jobs(client: &Client) -> Result<Vec<pb::TrainingJob>, Failure> {
    chosen_jobs(client, &JobChoice::default()).await
}

/// Returns every job of the caller, newest first, also for administrators.
pub(super) async fn own_jobs(client: &Client) -> Result<Vec<pb::TrainingJob>, Failure> {
    let choice = JobChoice {
        own: true,
        ..JobChoice::default()
    };
    chosen_jobs(client, &choice).await
}

/// Returns the chosen jobs, newest first.
pub(super) async fn chosen_jobs(
    client: &Client,
    choice: &JobChoice,
) -> Result<Vec<pb::TrainingJob>, Failure> {
    let limit = choice.limit.unwrap_or(usize::MAX);
    let (mut chosen, mut page_token) = (Vec::new(), String::new());
    for _ in 0..MAX_PAGES {
        let request = pb::ListTrainingJobsRequest {
            page_size: choice.page_size(),
            page_token,
            states: choice.states.iter().map(|&state| state.into()).collect(),
            own: choice.own,
        };
        let page = client
            .training()
            .list_training_jobs(request)
            .await?
            .into_inner();
        let jobs = page.training_jobs.into_iter();
        chosen.extend(jobs.filter(|job| choice.has_labels_of(job)));
        chosen.truncate(limit);
        page_token = page.next_page_token;
        if page_token.is_empty() || chosen.len() == limit {
            return Ok(chosen);
        }
    }
    Err(endless("jobs"))
}

/// Returns true if the caller may list jobs, which needs the role submit.
pub(super) async fn may_list_jobs(client: &Client) -> Result<bool, Failure> {
    let request = pb::ListTrainingJobsRequest {
        page_size: 1,
        ..Default::default()
    };
    match client.training().list_training_jobs(request).await {
        Ok(_) => Ok(true),
        Err(refused) if is_denied(&refused) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Returns true if `given` names a job with its whole ID, so that no list is needed.
pub(super) fn is_whole_job(given: &str) -> bool {
    is_whole(without(JOBS, given))
}

/// Returns every dataset, newest first, without the findings of its rows.
pub(super) async fn all_datasets(client: &Client) -> Result<Vec<pb::Dataset>, Failure> {
    listed_datasets(client, pb::ListDatasetsRequest::default()).await
}

/// Returns every dataset of the caller, also for administrators, without the findings of its rows.
pub(super) async fn own_datasets(client: &Client) -> Result<Vec<pb::Dataset>, Failure> {
    let own = pb::ListDatasetsRequest {
        own: true,
        ..Default::default()
    };
    listed_datasets(client, own).await
}

async fn listed_datasets(
    client: &Client,
    wanted: pb::ListDatasetsRequest,
) -> Result<Vec<pb::Dataset>, Failure> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    for _ in 0..MAX_PAGES {
        let request = pb::ListDatasetsRequest {
            page_size: PAGE_SIZE,
            page_token,
            ..wanted.clone()
        };
        let page = client.datasets().list_datasets(request).await?.into_inner();
        all.extend(page.datasets);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
    Err(endless("datasets"))
}

fn endless(what: &str) -> Failure {
    Failure::Failed(format!(
        "the server's list of {what} does not end after {MAX_PAGES} pages"
    ))
}

/// Returns every base model of the server.
pub(super) async fn all_models(client: &Client) -> Result<Vec<pb::Model>, Failure> {
    let answer = client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await?;
    Ok(answer.into_inner().models)
}

/// Returns the name of the job that a user means. A name that nothing begins with is returned as it
/// is, so that the server refuses it.
///
/// # Errors
/// Returns a failure that names the candidates if several jobs are meant, or a failure if no job
/// can have this name.
pub(super) async fn job(client: &Client, given: &str) -> Result<String, Failure> {
    if given == LAST {
        let request = pb::ListTrainingJobsRequest {
            page_size: 1,
            own: true,
            ..Default::default()
        };
        let page = client.training().list_training_jobs(request).await?;
        let newest = page.into_inner().training_jobs.into_iter().next();
        return newest.map(|job| job.name).ok_or_else(|| none_yet("job"));
    }
    let id = id_in(JOBS, "job", given)?;
    if is_whole(id) {
        return Ok(full_name(JOBS, id));
    }
    let names: Vec<String> = all_jobs(client)
        .await?
        .into_iter()
        .map(|j| j.name)
        .collect();
    pick(JOBS, id, &names)
}

/// Returns the name of the dataset that a user means. A name that nothing begins with is returned
/// as it is.
///
/// # Errors
/// The errors of [`job`].
pub(super) async fn dataset(client: &Client, given: &str) -> Result<String, Failure> {
    if given == LAST {
        let newest = newest_dataset(client).await?;
        return newest.ok_or_else(|| none_yet("dataset"));
    }
    let id = id_in(DATASETS, "dataset", given)?;
    if is_whole(id) {
        return Ok(full_name(DATASETS, id));
    }
    let all = all_datasets(client).await?;
    let names: Vec<String> = all.into_iter().map(|d| d.name).collect();
    pick(DATASETS, id, &names)
}

/// Returns the name of the caller's newest dataset; `None` if there is none.
pub(super) async fn newest_dataset(client: &Client) -> Result<Option<String>, Failure> {
    let request = pb::ListDatasetsRequest {
        page_size: 1,
        own: true,
        ..Default::default()
    };
    let page = client.datasets().list_datasets(request).await?;
    let newest = page.into_inner().datasets.into_iter().next();
    Ok(newest.map(|dataset| dataset.name))
}

/// Returns the name of the base model that a user means.
///
/// # Errors
/// Returns a failure that names the server's models if none or several are meant.
pub(super) async fn model(client: &Client, given: &str) -> Result<String, Failure> {
    let id = without(MODELS, given);
    let all = all_models(client).await?;
    let names: Vec<String> = all.into_iter().map(|m| m.name).collect();
    let name = pick(MODELS, id, &names)?;
    if names.contains(&name) {
        return Ok(name);
    }
    let meant = nearest(&name, names.iter().map(String::as_str))
        .map(|meant| format!("did you mean {meant}? "))
        .unwrap_or_default();
    Err(Failure::Usage(format!(
        "{name} does not exist: {meant}This server has {}",
        names.join(", ")
    )))
}

/// Returns the name of the checkpoint that a user means with `JOB/checkpoints/STEP`. A job alone
/// means its newest checkpoint.
///
/// # Errors
/// The errors of [`job`].
pub(super) async fn checkpoint(client: &Client, given: &str) -> Result<String, Failure> {
    let (of, step) = given.split_once(CHECKPOINTS).unwrap_or((given, "latest"));
    Ok(format!("{}/checkpoints/{step}", job(client, of).await?))
}

/// Returns the name of the checkpoint that a user wants to delete: its step must be given.
///
/// # Errors
/// The errors of [`job`], and a failure if the step is missing or is not a number.
pub(super) async fn one_checkpoint(client: &Client, given: &str) -> Result<String, Failure> {
    check_step(given)?;
    checkpoint(client, given).await
}

/// Refuses the name of a checkpoint without the number of its step.
fn check_step(given: &str) -> Result<(), Failure> {
    let refused = match given.split_once(CHECKPOINTS) {
        None => {
            format!("{given} is a job: name one of its checkpoints, {given}/checkpoints/STEP")
        }
        Some((_, step)) if step.parse::<u64>().is_ok() => return Ok(()),
        Some((job, step @ ("latest" | "best"))) => format!(
            "{given}: name a step, {job}/checkpoints/STEP, because {step} may become another \
             checkpoint before the deletion"
        ),
        Some((job, _)) => format!("{given}: name a step, {job}/checkpoints/STEP, a number"),
    };
    Err(Failure::Usage(refused))
}

/// Returns a name with the job or dataset that [`LAST`] stood for when `earlier`, a whole name, was
/// made of it. Every other name is returned as it is.
pub(super) fn with_earlier_last(given: &str, earlier: Option<&str>) -> String {
    let job_of = |name: &str| name.split_once(CHECKPOINTS).map(|(job, _)| job.to_owned());
    let of = job_of(given).unwrap_or_else(|| given.to_owned());
    let collections = [JOBS, DATASETS].map(|collection| format!("{collection}/"));
    let earlier = earlier
        .filter(|name| of == LAST && collections.iter().any(|prefix| name.starts_with(prefix)));
    match earlier {
        Some(name) => {
            let last = job_of(name).unwrap_or_else(|| name.to_owned());
            given.replacen(LAST, &last, 1)
        }
        None => given.to_owned(),
    }
}

fn without<'a>(collection: &str, name: &'a str) -> &'a str {
    name.strip_prefix(collection)
        .and_then(|rest| rest.strip_prefix('/'))
        .unwrap_or(name)
}

/// Returns the ID, or its beginning, in a name of a collection. `what` is the collection's word for
/// one of its resources.
///
/// # Errors
/// Returns a failure with what was given if it cannot be an ID.
fn id_in<'a>(collection: &str, what: &str, given: &'a str) -> Result<&'a str, Failure> {
    let id = without(collection, given);
    if is_valid_id(id) {
        return Ok(id);
    }
    Err(Failure::Usage(match given.starts_with('@') {
        true => format!(
            "{given} names no {what}: {LAST} is the only name with @, your own newest {what}"
        ),
        false => format!(
            "{given:?} is no name of a {what}: give {collection}/ID, the ID, its beginning, or \
             {LAST}"
        ),
    }))
}

fn is_whole(id: &str) -> bool {
    id.len() == WHOLE_ID && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

fn none_yet(what: &str) -> Failure {
    Failure::Usage(format!(
        "{LAST} is your own newest {what}, and you have none yet: give the {what}'s ID"
    ))
}

/// Returns the one name with the ID `id`, or else the one whose ID begins with it.
fn pick(collection: &str, id: &str, names: &[String]) -> Result<String, Failure> {
    let exact = full_name(collection, id);
    if names.contains(&exact) {
        return Ok(exact);
    }
    let meant: Vec<&String> = names
        .iter()
        .filter(|name| name.starts_with(&exact))
        .collect();
    if !meant.is_empty() && id.chars().count() < MIN_PREFIX {
        return Err(Failure::Usage(format!(
            "{id:?} is too short for the beginning of an ID: give at least {MIN_PREFIX} characters"
        )));
    }
    match &meant[..] {
        [] => Ok(exact),
        [one] => Ok((*one).clone()),
        many => {
            let mut named: Vec<&str> = many.iter().take(MAX_NAMED).map(|n| n.as_str()).collect();
            let more = format!("and {} more", many.len().saturating_sub(MAX_NAMED));
            if many.len() > MAX_NAMED {
                named.push(&more);
            }
            Err(Failure::Usage(format!(
                "{id} may be any of {}: {}; give more characters of the ID",
                many.len(),
                named.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_beginning_of_an_id_suffices_if_it_is_unique() {
        let names: Vec<String> = ["0193a000", "0193a0ff", "0193b000", "0193"]
            .map(|id| format!("{JOBS}/{id}"))
            .to_vec();
        let picked = |id: &str| pick(JOBS, id, &names).unwrap();
        assert_eq!(picked("0193b"), "trainingJobs/0193b000");
        // This ID is the beginning of others.
        assert_eq!(picked("0193"), "trainingJobs/0193");
        // The server refuses these with its own error.
        assert_eq!(picked("none"), "trainingJobs/none");
        assert_eq!(picked("018"), "trainingJobs/018");
        match pick(JOBS, "019", &names) {
            Err(Failure::Usage(said)) => assert!(said.contains("at least 4 characters"), "{said}"),
            other => panic!("{other:?}"),
        }
        match pick(JOBS, "0193a0", &names) {
            Err(Failure::Usage(said)) => assert_eq!(
                said,
                "0193a0 may be any of 2: trainingJobs/0193a000, trainingJobs/0193a0ff; give more \
                 characters of the ID"
            ),
            other => panic!("{other:?}"),
        }
        let many: Vec<String> = (0..20).map(|i| format!("{JOBS}/aaaa{i}")).collect();
        match pick(JOBS, "aaaa", &many) {
            Err(Failure::Usage(said)) => assert!(said.contains("aaaa7, and 12 more;"), "{said}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn last_keeps_its_earlier_meaning_and_other_names_stay() {
        let job = Some("trainingJobs/a/checkpoints/latest");
        for (given, earlier, expected) in [
            ("@last", job, "trainingJobs/a"),
            (
                "@last/checkpoints/best",
                job,
                "trainingJobs/a/checkpoints/best",
            ),
            ("@last", Some("datasets/d"), "datasets/d"),
            ("@last", Some("models/tiny"), "@last"),
            ("@last", Some(""), "@last"),
            ("@last", None, "@last"),
            ("trainingJobs/b", job, "trainingJobs/b"),
            ("tiny", job, "tiny"),
        ] {
            assert_eq!(with_earlier_last(given, earlier), expected, "{given}");
        }
    }

    #[test]
    fn a_list_is_chosen_by_labels_and_its_pages_are_no_larger_than_the_limit() {
        let labels = |all: &[(&str, &str)]| -> Vec<(String, String)> {
            let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
            all.iter().map(owned).collect()
        };
        let job = pb::TrainingJob {
            labels: labels(&[("team", "a"), ("env", "prod")])
                .into_iter()
                .collect(),
            ..Default::default()
        };
        for (wanted, is_chosen) in [
            (&[("team", "a")][..], true),
            (&[("team", "a"), ("env", "prod")], true),
            (&[("team", "a"), ("env", "dev")], false),
            (&[("owner", "a")], false),
        ] {
            let choice = JobChoice {
                labels: labels(wanted),
                ..JobChoice::default()
            };
            assert_eq!(choice.has_labels_of(&job), is_chosen, "{wanted:?}");
        }
        let mut choice = JobChoice::default();
        assert!(choice.has_labels_of(&job));
        assert_eq!(choice.page_size(), PAGE_SIZE);
        choice.limit = Some(3);
        assert_eq!(choice.page_size(), 3);
        choice.limit = Some(5000);
        assert_eq!(choice.page_size(), PAGE_SIZE);
        choice.limit = Some(3);
        choice.labels = labels(&[("team", "a")]);
        assert_eq!(choice.page_size(), PAGE_SIZE);
    }

    /// Returns what a failure about a name says.
    fn refusal<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
        match result {
            Err(Failure::Usage(said)) => said,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_name_that_cannot_be_one_is_refused_as_it_was_given() {
        assert_eq!(
            refusal(id_in(JOBS, "job", "@2")),
            "@2 names no job: @last is the only name with @, your own newest job"
        );
        assert_eq!(
            refusal(id_in(DATASETS, "dataset", "a b")),
            "\"a b\" is no name of a dataset: give datasets/ID, the ID, its beginning, or @last"
        );
        for of_something_else in [
            "",
            "trainingJobs/",
            "datasets/x",
            "trainingJobs/x/checkpoints/1",
        ] {
            let said = refusal(id_in(JOBS, "job", of_something_else));
            assert!(said.contains(&format!("{of_something_else:?}")), "{said}");
        }
        assert_eq!(id_in(JOBS, "job", "trainingJobs/0193").unwrap(), "0193");
        assert_eq!(id_in(JOBS, "job", "none").unwrap(), "none");
    }

    #[test]
    fn a_deletion_needs_the_number_of_a_step() {
        assert!(check_step("@last/checkpoints/12").is_ok());
        assert_eq!(
            refusal(check_step("0193a/checkpoints/latest")),
            "0193a/checkpoints/latest: name a step, 0193a/checkpoints/STEP, because latest may \
             become another checkpoint before the deletion"
        );
        assert_eq!(
            refusal(check_step("0193a/checkpoints/x")),
            "0193a/checkpoints/x: name a step, 0193a/checkpoints/STEP, a number"
        );
        assert_eq!(
            refusal(check_step("0193a")),
            "0193a is a job: name one of its checkpoints, 0193a/checkpoints/STEP"
        );
    }

    #[test]
    fn ids_are_found_in_names_with_and_without_their_collection() {
        assert_eq!(without(JOBS, "trainingJobs/x"), "x");
        assert_eq!(without(JOBS, "trainingJobsx"), "trainingJobsx");
        assert!(is_whole("0193c8e4-7a3f-7000-8000-000000000000") && !is_whole("0193c8e4-7a3f"));
    }
}
