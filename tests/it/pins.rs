//! A job continues with the adapter that it was created with, whatever happens to the adapter's
//! folder. swaps.rs tests the same for base models and for replicas.

use std::path::Path;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use tempfile::TempDir;

use crate::server::{
    Server, create, get, job, latest, pairs, pause, resume, score, scored, submit, succeed, upload,
};
use crate::support::golden;

/// Steps of a job that is paused before its end. It must last for seconds, because a busy machine
/// may pause it late.
pub const STEPS: u64 = 300;
/// Loss of a pair whose policy equals its reference: log 2.
pub const UNDECIDED: f64 = std::f64::consts::LN_2;

const WEIGHTS: &str = "adapter_model.safetensors";

/// Starts a server with a data folder, models and flags.
type Start = Box<dyn Fn(&Path, &str, &[&str]) -> Server>;

/// A server whose adapter folder holds one adapter, `x`. The field `other` has the weights of
/// another adapter.
pub struct Adapters {
    start: Start,
    data: TempDir,
    adapters: TempDir,
    pub server: Server,
    pub client: Client,
    dataset: String,
    other: Vec<u8>,
}

impl Adapters {
    async fn start() -> Self {
        Self::start_as(Box::new(Server::start_with)).await
    }

    pub async fn start_as(start: Start) -> Self {
        let (data, adapters) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let server = Self::serve(&start, data.path(), adapters.path());
        let client = server.client().await;
        let dataset = upload(&client, "pairs.jsonl").await.name;
        let first = submit(&client, job(&dataset, 2)).await;
        let second = pb::TrainingJob {
            seed: Some(7),
            ..job(&dataset, 6)
        };
        let second = submit(&client, second).await;
        let elsewhere = tempfile::tempdir().unwrap();
        for (name, folder) in [
            (&first, adapters.path().join("x")),
            (&second, elsewhere.path().into()),
        ] {
            succeed(&client, name).await;
            let format = pb::ExportFormat::Adapter;
            client
                .download_checkpoint(&latest(name), format, &folder)
                .await
                .unwrap();
        }
        let other = std::fs::read(elsewhere.path().join(WEIGHTS)).unwrap();
        Adapters {
            start,
            data,
            adapters,
            server,
            client,
            dataset,
            other,
        }
    }

    fn serve(start: &Start, data: &Path, adapters: &Path) -> Server {
        let models = format!("tiny={}", golden("models/llama").display());
        start(
            data,
            &models,
            &["--adapter-dir", adapters.to_str().unwrap()],
        )
    }

    /// Starts a server with a data folder of its own and the same adapter folder.
    pub fn start_server(&self, data: &Path) -> Server {
        Self::serve(&self.start, data, self.adapters.path())
    }

    /// Returns a job that starts from `x`.
    pub fn job(&self, steps: u64) -> pb::TrainingJob {
        let init_adapter = "x".to_owned();
        let lora = pb::LoraConfig {
            rank: Some(4),
            init_adapter,
            ..Default::default()
        };
        let method = Some(pb::training_job::Method::Lora(lora));
        pb::TrainingJob {
            method,
            ..job(&self.dataset, steps)
        }
    }

    /// Replaces the weights of `x` by those of the other adapter.
    pub fn overwrite(&self) {
        let file = self.adapters.path().join("x").join(WEIGHTS);
        assert_ne!(std::fs::read(&file).unwrap(), self.other);
        std::fs::write(file, &self.other).unwrap();
    }

    /// Restarts the server without its reference cache, so that everything that it remembered must
    /// be computed again.
    async fn restart(&mut self) {
        self.server.kill();
        let _ = std::fs::remove_file(self.data.path().join("reference-cache.redb"));
        self.server = self.start_server(self.data.path());
        self.client = self.server.client().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_from_an_overwritten_adapter_is_measured_against_the_new_one() {
    let it = Adapters::start().await;
    for overwritten in [false, true] {
        if overwritten {
            it.overwrite();
        }
        let name = submit(&it.client, it.job(3)).await;
        let first = f64::from_bits(succeed(&it.client, &name).await[&1]);
        // Nothing is trained yet, so the policy equals its reference.
        assert!(
            (first - UNDECIDED).abs() < 1e-6,
            "overwritten: {overwritten}, loss {first}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_continues_from_the_adapter_that_it_started_from() {
    let mut it = Adapters::start().await;
    let undisturbed = submit(&it.client, it.job(STEPS)).await;
    let expected = succeed(&it.client, &undisturbed).await;
    let name = submit(&it.client, it.job(STEPS)).await;
    pause(&it.client, &name).await;
    it.overwrite();
    it.restart().await;
    resume(&it.client, &name).await.unwrap();
    let losses = succeed(&it.client, &name).await;
    assert_eq!(
        losses.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    let different = expected.iter().find(|(step, loss)| losses[step] != **loss);
    let shown = different.map(|(s, l)| (s, f64::from_bits(*l), f64::from_bits(losses[s])));
    assert_eq!(
        shown, None,
        "the first step whose loss is not the undisturbed run's"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_continues_without_the_folder_of_its_adapter() {
    let it = Adapters::start().await;
    let name = submit(&it.client, it.job(STEPS)).await;
    pause(&it.client, &name).await;
    std::fs::remove_dir_all(it.adapters.path().join("x")).unwrap();
    resume(&it.client, &name).await.unwrap();
    succeed(&it.client, &name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_scored_against_the_adapter_that_its_job_started_from() {
    let mut it = Adapters::start().await;
    let name = submit(&it.client, it.job(3)).await;
    succeed(&it.client, &name).await;
    let before = score(&it.client, &latest(&name), pairs()).await;
    it.overwrite();
    it.restart().await;
    let after = score(&it.client, &latest(&name), pairs()).await;
    for (a, b) in before.results.iter().zip(&after.results) {
        assert_eq!(
            scored(a).margin.to_bits(),
            scored(b).margin.to_bits(),
            "{}",
            a.id
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_shows_the_name_of_its_adapter_that_the_client_gave() {
    let it = Adapters::start().await;
    let created = create(&it.client, it.job(1)).await.unwrap();
    let list = pb::ListTrainingJobsRequest::default();
    let mut listed = it
        .client
        .training()
        .list_training_jobs(list)
        .await
        .unwrap()
        .into_inner();
    for shown in [
        get(&it.client, &created.name).await,
        created,
        listed.training_jobs.remove(0),
    ] {
        let Some(pb::training_job::Method::Lora(lora)) = shown.method else {
            panic!("{shown:?}")
        };
        assert_eq!(lora.init_adapter, "x");
    }
}
