//! Access control: tokens, roles, ownership, TLS, quotas, deadlines.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bradley::rpc::client::{Client, ClientError, Target};
use bradley::rpc::pb;
use bradley::rpc::pb::scoring_service_client::ScoringServiceClient;
use hyper_util::rt::TokioExecutor;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tonic::Code;
use tonic_types::StatusExt;

use crate::server::{
    CONNECT_LIMIT, Server, became, create, create_token, create_token_with_id, events, finish, id,
    job, pairs, score, state, submit, try_get, upload,
};
use crate::support::{golden, needed};
use crate::wait::until;

/// Runs a command that must succeed, and returns its standard output.
fn bradley(arguments: &[&str]) -> String {
    let done = Command::new(crate::support::binary())
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

fn tiny() -> String {
    format!("tiny={}", golden("models/llama").display())
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_roles_and_owners_decide_who_may_do_what() {
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit.jsonl");
    let (a_id, a_token) = create_token_with_id(dir.path(), "team-a", "submit,score");
    let b_token = create_token(dir.path(), "team-b", "submit,score");
    let scorer_token = create_token(dir.path(), "team-b", "score");
    let admin_token = create_token(dir.path(), "ops", "admin");
    let server = Server::start_with(
        dir.path(),
        &tiny(),
        &["--auth", "tokens", "--audit-log", audit.to_str().unwrap()],
    );

    let nobody = server.client().await;
    assert!(
        nobody.health().await.unwrap(),
        "a probe without a token fails"
    );
    let refused = nobody
        .models()
        .list_models(pb::ListModelsRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "UNAUTHENTICATED"
    );
    let mut forged = a_token.clone();
    forged.replace_range(
        forged.len() - 1..,
        if a_token.ends_with('0') { "1" } else { "0" },
    );
    for wrong in [
        forged.as_str(),
        "brd_x_y",
        "x",
        &format!("brd_{a_id}_{}", "0".repeat(64)),
    ] {
        let client = server.client_with(wrong).await;
        assert_eq!(
            client
                .models()
                .list_models(pb::ListModelsRequest {})
                .await
                .unwrap_err()
                .code(),
            Code::Unauthenticated,
            "{wrong}"
        );
        assert_eq!(
            try_get(&client, "trainingJobs/x").await.unwrap_err().code(),
            Code::Unauthenticated,
            "{wrong}"
        );
    }

    let (a, b) = (
        server.client_with(&a_token).await,
        server.client_with(&b_token).await,
    );
    let (scorer, admin) = (
        server.client_with(&scorer_token).await,
        server.client_with(&admin_token).await,
    );
    let dataset = upload(&a, "pairs.jsonl").await;
    let name = submit(&a, job(&dataset.name, 4)).await;
    finish(&a, &name).await;
    assert_eq!(try_get(&a, &name).await.unwrap().owner, "team-a");

    // Another owner's job looks like one that does not exist.
    let others = try_get(&b, &name).await.unwrap_err();
    let nothing = try_get(&b, "trainingJobs/none").await.unwrap_err();
    assert_eq!(
        (others.code(), nothing.code()),
        (Code::PermissionDenied, Code::PermissionDenied)
    );
    assert_eq!(
        others.message().replace(&name, "X"),
        nothing.message().replace("trainingJobs/none", "X")
    );
    assert_eq!(
        create(&b, job(&dataset.name, 1)).await.unwrap_err().code(),
        Code::PermissionDenied,
        "a job on another owner's dataset"
    );
    let policy = format!("{name}/checkpoints/latest");
    let options = Some(pb::ScoringOptions {
        policy: policy.clone(),
        ..Default::default()
    });
    let request = pb::ScorePairsRequest {
        options,
        pairs: pairs(),
    };
    assert_eq!(
        scorer
            .scoring()
            .score_pairs(request.clone())
            .await
            .unwrap_err()
            .code(),
        Code::PermissionDenied,
        "scoring with another owner's checkpoint"
    );
    let deletion = pb::DeleteTrainingJobRequest { name: name.clone() };
    assert_eq!(
        b.training()
            .delete_training_job(deletion)
            .await
            .unwrap_err()
            .code(),
        Code::PermissionDenied
    );
    let mut listed = Vec::new();
    for client in [&a, &b, &admin] {
        let jobs = client
            .training()
            .list_training_jobs(pb::ListTrainingJobsRequest::default())
            .await
            .unwrap()
            .into_inner();
        let datasets = client
            .datasets()
            .list_datasets(pb::ListDatasetsRequest::default())
            .await
            .unwrap()
            .into_inner();
        listed.push((jobs.training_jobs.len(), datasets.datasets.len()));
    }
    assert_eq!(listed, [(1, 1), (0, 0), (1, 1)]);

    // Roles.
    assert!(score(&scorer, "models/tiny", pairs()).await.results.len() > 1);
    assert_eq!(
        try_get(&scorer, &name).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    assert!(
        admin.scoring().score_pairs(request).await.is_ok(),
        "an administrator is refused"
    );
    assert!(try_get(&admin, &name).await.is_ok());
    assert_eq!(
        try_get(&admin, "trainingJobs/none")
            .await
            .unwrap_err()
            .code(),
        Code::NotFound
    );

    // A revoked token is refused within seconds, and its open calls end.
    let long = submit(&a, job(&dataset.name, 100_000)).await;
    let request = pb::StreamTrainingEventsRequest {
        parent: long.clone(),
        after_sequence: 0,
        ..Default::default()
    };
    let mut open = a
        .training()
        .stream_training_events(request)
        .await
        .unwrap()
        .into_inner();
    let ended = tokio::spawn(async move {
        loop {
            match open.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(e) => return Some(e.code()),
            }
        }
    });
    bradley(&[
        "tokens",
        "revoke",
        &a_id,
        "--data-dir",
        dir.path().to_str().unwrap(),
    ]);
    let limit = Duration::from_secs(60);
    until("the refusal of a revoked token", limit, async || {
        try_get(&a, &name).await.is_err()
    })
    .await;
    assert_eq!(
        try_get(&a, &name).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    let ended = tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .expect("the stream does not end")
        .unwrap();
    assert_eq!(ended, Some(Code::Unauthenticated));
    admin
        .training()
        .cancel_training_job(pb::CancelTrainingJobRequest { name: long })
        .await
        .unwrap();

    // Only an administrator may give a job a priority above the limit for clients, which is 0.
    let mut urgent = job(&dataset.name, 1);
    urgent.priority = 1;
    let bad = create(&b, urgent).await.unwrap_err();
    let fields: Vec<String> = bad
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|v| v.field)
        .collect();
    assert_eq!(fields, ["training_job.priority"]);

    // Secrets are in no file of the server; the audit log has who did what.
    let secret = a_token.rsplit('_').next().unwrap().as_bytes().to_vec();
    let log = std::fs::read_to_string(&audit).unwrap();
    for file in ["bradley.db", "bradley.db-wal", "audit.jsonl"] {
        let bytes = std::fs::read(dir.path().join(file)).unwrap_or_default();
        assert!(
            !bytes.windows(secret.len()).any(|w| w == secret),
            "{file} contains a secret"
        );
    }
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let done = |owner: &str, action: &str, resource: &str| {
        lines.iter().any(|l| {
            let f = &l["fields"];
            f["owner"] == owner
                && f["action"] == action
                && f["resource"] == resource
                && l["span"]["request_id"].is_string()
        })
    };
    assert!(
        done("team-a", "upload", &dataset.name) && done("team-a", "create", &name),
        "{log}"
    );
    assert!(
        lines
            .iter()
            .any(|l| l["fields"]["message"] == "refused" && l["fields"]["peer"].is_string()),
        "{log}"
    );
    // The log has the reasons that clients do not learn.
    for reason in [
        "the token is unknown: it has no ID, and token_file does not declare it".to_owned(),
        format!("the text of the token {a_id} is wrong after its ID: it is mistyped or guessed"),
        format!("the token {a_id} does not exist: it was revoked, or is of another database"),
    ] {
        assert!(
            lines.iter().any(|l| l["fields"]["reason"] == reason),
            "{reason}: {log}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_have_quotas_and_jobs_a_time_to_live() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "--max-jobs-per-client",
        "2",
        "--lease",
        "1",
        "--max-scoring-tokens-per-client",
        "64",
    ];
    let server = Server::start_with(dir.path(), &tiny(), &flags);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let long = submit(&client, job(&dataset.name, 100_000)).await;
    let again = pb::CreateTrainingJobRequest {
        training_job: Some(job(&dataset.name, 100_000)),
        request_id: "r".into(),
        ..Default::default()
    };
    let other = client
        .training()
        .create_training_job(again.clone())
        .await
        .unwrap()
        .into_inner()
        .name;
    let refused = create(&client, job(&dataset.name, 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "TOO_MANY_JOBS"
    );
    assert!(refused.get_details_quota_failure().is_some());
    let same = client
        .training()
        .create_training_job(again)
        .await
        .unwrap()
        .into_inner()
        .name;
    assert_eq!(
        same, other,
        "a repeated request must create no job and need no quota"
    );
    client
        .training()
        .cancel_training_job(pb::CancelTrainingJobRequest {
            name: other.clone(),
        })
        .await
        .unwrap();
    finish(&client, &other).await;
    let mut short_lived = job(&dataset.name, 1);
    short_lived.ttl = Some(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    });
    short_lived.priority = 1;
    let expiring = submit(&client, short_lived).await;
    // After its time to live a job is deleted, and after that its files.
    let folder = dir.path().join("jobs").join(id(&expiring));
    until(
        "the deletion of an expired job",
        Duration::from_secs(60),
        async || try_get(&client, &expiring).await.is_err() && !folder.exists(),
    )
    .await;
    assert!(try_get(&client, &long).await.is_ok());

    // Many pairs at the same time exceed the client's share of the queue.
    let many: Vec<pb::Pair> = (0..8).flat_map(|_| pairs()).collect();
    let options = Some(pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    });
    let answer = client
        .scoring()
        .score_pairs(pb::ScorePairsRequest {
            options,
            pairs: many,
        })
        .await
        .unwrap()
        .into_inner();
    let refused = answer
        .results
        .iter()
        .filter(|r| matches!(&r.result, Some(pb::pair_result::Result::Error(e)) if e.code == 8))
        .count();
    assert!(
        refused > 0 && refused < answer.results.len(),
        "{refused} of {} are refused",
        answer.results.len()
    );
    client
        .training()
        .cancel_training_job(pb::CancelTrainingJobRequest { name: long.clone() })
        .await
        .unwrap();
    finish(&client, &long).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_the_same_priority_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(dir.path(), &tiny(), &["--time-slice", "1"]);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let jobs = [
        submit(&client, job(&dataset.name, 100_000)).await,
        submit(&client, job(&dataset.name, 100_000)).await,
    ];
    let mut runs = [0, 0];
    // Both jobs run on the device more than once.
    until(
        "the second turn of both jobs",
        Duration::from_secs(60),
        async || {
            for (name, runs) in jobs.iter().zip(&mut runs) {
                *runs = count_starts(&client, name).await;
            }
            runs.iter().all(|n| *n >= 2)
        },
    )
    .await;
    for name in &jobs {
        client
            .training()
            .cancel_training_job(pb::CancelTrainingJobRequest { name: name.clone() })
            .await
            .unwrap();
    }
}

/// Returns the number of times that a job began to run.
async fn count_starts(client: &Client, name: &str) -> usize {
    let is_start = |e: &&pb::TrainingEvent| {
        let event = e.event.as_ref();
        event.is_some_and(|event| became(event, pb::JobState::Running))
    };
    events(client, name).await.iter().filter(is_start).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_estimate_has_the_steps_and_pairs_of_the_job() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut wanted = job(&dataset.name, 0);
    wanted.batch = Some(pb::BatchConfig {
        batch_size: Some(2),
        max_length: Some(256),
        epochs: Some(3.0),
        ..Default::default()
    });
    wanted.evaluation = Some(pb::training_job::Evaluation::EvalFraction(0.25));
    let request = pb::EstimateTrainingJobRequest {
        training_job: Some(wanted.clone()),
    };
    let estimate = client
        .training()
        .estimate_training_job(request)
        .await
        .unwrap()
        .into_inner();
    let name = submit(&client, wanted).await;
    finish(&client, &name).await;
    let done = try_get(&client, &name).await.unwrap();
    assert_eq!(estimate.total_steps, done.progress.unwrap().total_steps);
    assert_eq!(
        estimate.train_pairs + estimate.eval_pairs,
        crate::support::rows("pairs.jsonl").len() as u64
    );
    assert!(
        estimate.eval_pairs > 0
            && estimate.tokens > estimate.train_pairs
            && estimate.longest_pair_tokens > 2
    );
    assert!(estimate.memory_bytes > 0 && estimate.memory_bytes < estimate.memory_limit_bytes);
    let seconds = estimate.duration.unwrap();
    assert!(seconds.seconds >= 0 && (seconds.seconds > 0 || seconds.nanos > 0));
    let missing = client
        .training()
        .estimate_training_job(pb::EstimateTrainingJobRequest {
            training_job: Some(job("datasets/none", 1)),
        })
        .await;
    assert_eq!(missing.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_init_adapter_outside_of_the_adapter_folder_is_refused() {
    let (dir, adapters, outside) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let server = Server::start_with(
        dir.path(),
        &tiny(),
        &["--adapter-dir", adapters.path().to_str().unwrap()],
    );
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let first = submit(&client, job(&dataset.name, 2)).await;
    finish(&client, &first).await;
    let name = format!("{first}/checkpoints/latest");
    for folder in [adapters.path().join("mine"), outside.path().join("theirs")] {
        client
            .download_checkpoint(&name, pb::ExportFormat::Adapter, &folder)
            .await
            .unwrap();
    }
    std::os::unix::fs::symlink(outside.path(), adapters.path().join("link")).unwrap();
    let from = |adapter: &str| {
        let mut wanted = job(&dataset.name, 1);
        let lora = pb::LoraConfig {
            rank: Some(4),
            init_adapter: adapter.into(),
            ..Default::default()
        };
        wanted.method = Some(pb::training_job::Method::Lora(lora));
        wanted
    };
    let theirs = outside.path().join("theirs");
    for bad in [
        theirs.to_str().unwrap(),
        "link/theirs",
        &format!(
            "../{}/theirs",
            outside.path().file_name().unwrap().to_str().unwrap()
        ),
        "..",
    ] {
        let refused = create(&client, from(bad)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{bad}");
    }
    let second = submit(&client, from("mine")).await;
    finish(&client, &second).await;
    assert_eq!(state(&client, &second).await, pb::JobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_on_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _server = Server::start(dir.path());
    let second = Command::new(crate::support::binary())
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--http-listen",
            "off",
            "--models",
            &tiny(),
            "--data-dir",
        ])
        .arg(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(
        !second.status.success() && said.contains("already uses the data directory"),
        "{said}"
    );
    // The error comes before the models are loaded, and before a warning about a locked cache.
    assert!(
        !said.contains("reference cache") && !said.contains("model opened"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_are_closed_and_unknown_methods_make_no_metrics() {
    use tokio::io::AsyncReadExt;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(
        dir.path(),
        &tiny(),
        &["--max-connections", "2", "--max-dataset-text-bytes", "100"],
    );
    let address = server.address.trim_start_matches("http://").to_owned();
    let mut silent = [
        tokio::net::TcpStream::connect(&address).await.unwrap(),
        tokio::net::TcpStream::connect(&address).await.unwrap(),
    ];
    for connection in &mut silent {
        // The server sends a GOAWAY frame or closes the connection at once.
        let _ = tokio::time::timeout(Duration::from_secs(30), connection.read(&mut [0; 8]))
            .await
            .expect("a silent connection stays open");
    }
    drop(silent);
    let client = server.client().await;
    assert!(
        client.health().await.unwrap(),
        "a closed connection still counts"
    );

    let channel = tonic::transport::Endpoint::from_shared(server.address.clone())
        .unwrap()
        .connect()
        .await
        .unwrap();
    for i in 0..20 {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/bradley.v1.Made{i}/Up").parse().unwrap();
        let codec =
            tonic_prost::ProstCodec::<pb::ListModelsRequest, pb::ListModelsResponse>::default();
        let refused = grpc
            .unary(tonic::Request::new(pb::ListModelsRequest {}), path, codec)
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::Unimplemented);
    }
    let metrics = server.metrics();
    assert!(
        metrics.contains("method=\"unknown\"") && !metrics.contains("Made"),
        "{metrics}"
    );

    let metadata = pb::UploadMetadata::default();
    let large = client
        .upload_dataset(&golden("pairs.jsonl"), metadata, |_| {})
        .await
        .unwrap_err();
    let ClientError::Refused(large) = large else {
        panic!("{large}")
    };
    assert_eq!(
        large.get_details_error_info().unwrap().reason,
        "DATASET_TOO_LARGE"
    );
    assert_eq!(
        std::fs::read_dir(dir.path().join("datasets"))
            .unwrap()
            .count(),
        0
    );
}

/// A certificate authority: its own certificate in PEM, and what signs others.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        Authority {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// Signs a new certificate, and returns it and its key in PEM.
    fn sign(&self, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        params.extended_key_usages = vec![usage];
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

/// A server with TLS, and a folder with its certificates and those of two clients: `client`,
/// which the server accepts, and `stranger`, whose certificate another authority signed.
pub struct TlsServer {
    server: Server,
    files: tempfile::TempDir,
    _data_dir: tempfile::TempDir,
}

impl TlsServer {
    pub fn start() -> Self {
        let (data_dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| files.path().join(name);
        let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
        let (servers, clients) = (Authority::new(), Authority::new());
        write_server_certificate(files.path(), &servers);
        write("clients.pem", &clients.certificate);
        for (name, authority) in [("client", &clients), ("stranger", &servers)] {
            let (certificate, key) = authority.sign(ExtendedKeyUsagePurpose::ClientAuth);
            write(&format!("{name}.pem"), &certificate);
            write(&format!("{name}.key"), &key);
        }
        let path = |name: &str| at(name).to_str().unwrap().to_owned();
        let (cert, key, ca) = (path("server.pem"), path("server.key"), path("clients.pem"));
        let flags = [
            "--tls-cert",
            &cert,
            "--tls-key",
            &key,
            "--tls-client-ca",
            &ca,
        ];
        let server = Server::start_with(data_dir.path(), &tiny(), &flags);
        TlsServer {
            server,
            files,
            _data_dir: data_dir,
        }
    }

    pub fn port(&self) -> &str {
        self.server.address.rsplit(':').next().unwrap()
    }

    /// Returns the path of one of the certificates or keys.
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }
}

/// Writes a certificate for the server that `authority` signed, its key, and the authority's own
/// certificate, which clients trust.
fn write_server_certificate(folder: &Path, authority: &Authority) {
    let (certificate, key) = authority.sign(ExtendedKeyUsagePurpose::ServerAuth);
    let files = [
        ("server.pem", &certificate),
        ("server.key", &key),
        ("ca.pem", &authority.certificate),
    ];
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs grpcurl (BRADLEY_TEST_GRPCURL)"]
async fn grpcurl_connects_with_a_client_certificate() {
    let grpcurl = needed("BRADLEY_TEST_GRPCURL");
    let tls = TlsServer::start();
    let done = Command::new(grpcurl)
        .arg("-cacert")
        .arg(tls.file("ca.pem"))
        .arg("-cert")
        .arg(tls.file("client.pem"))
        .arg("-key")
        .arg(tls.file("client.key"))
        .args([
            &format!("localhost:{}", tls.port()),
            "bradley.v1.ModelService/ListModels",
        ])
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&done.stdout).contains("models/tiny"),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_client_certificates_and_reloads_changed_files() {
    let tls = TlsServer::start();
    let at = |name: &str| tls.file(name);
    let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
    let port = tls.port();

    let connect = async |identity: Option<&str>| {
        let target = Target {
            address: format!("https://localhost:{port}"),
            token: None,
            tls_ca: Some(at("ca.pem")),
            tls_identity: identity
                .map(|name| (at(&format!("{name}.pem")), at(&format!("{name}.key")))),
        };
        let client = Client::connect(&target, CONNECT_LIMIT).await?;
        client
            .models()
            .list_models(pb::ListModelsRequest {})
            .await?;
        Ok::<Client, ClientError>(client)
    };
    let client = connect(Some("client")).await.unwrap();
    assert!(
        connect(None).await.is_err(),
        "a client without a certificate is accepted"
    );
    assert!(
        connect(Some("stranger")).await.is_err(),
        "a certificate of another authority is accepted"
    );
    let plain = Client::connect(&Target::plain(&tls.server.address), CONNECT_LIMIT).await;
    if let Ok(plain) = plain {
        assert!(
            plain.health().await.is_err(),
            "a client without TLS is accepted"
        );
    }

    // Damaged files change nothing; new ones are used for new connections while old ones continue.
    let old = std::fs::read_to_string(at("server.pem")).unwrap();
    write("server.pem", "-----BEGIN CERTIFICATE-----\nnonsense");
    until(
        "the refusal of a damaged certificate",
        Duration::from_secs(30),
        async || {
            tls.server
                .has_logged("the current certificates stay in use")
        },
    )
    .await;
    connect(Some("client")).await.unwrap();
    write("server.pem", &old);
    write_server_certificate(tls.files.path(), &Authority::new());
    until(
        "the use of the new certificate",
        Duration::from_secs(30),
        async || connect(Some("client")).await.is_ok(),
    )
    .await;
    client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_as_a_server_is_explained_to_both_sides() {
    let (data_dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = files.path().join("c.pem");
    let key_file = files.path().join("c.key");
    std::fs::write(&certificate, params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(&key_file, key.serialize_pem()).unwrap();
    let flags = [
        "--tls-cert",
        certificate.to_str().unwrap(),
        "--tls-key",
        key_file.to_str().unwrap(),
    ];
    let server = Server::start_with(data_dir.path(), &tiny(), &flags);
    assert!(server.has_logged("the server's certificate is a CA certificate (CA:TRUE)"));
    let mut doctor = Command::new(crate::support::binary());
    let out = doctor.arg("doctor").args(flags).output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    let wanted = "warning  TLS: the server's certificate is a CA certificate";
    assert!(said.contains(wanted), "{said}");
    let port = server.address.rsplit(':').next().unwrap();
    let target = Target {
        tls_ca: Some(certificate.clone()),
        ..Target::plain(format!("https://localhost:{port}"))
    };
    match Client::connect(&target, CONNECT_LIMIT).await {
        Err(ClientError::BadCertificate { problem, .. }) => {
            assert!(
                problem.contains("basicConstraints=critical,CA:FALSE"),
                "{problem}"
            );
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the client accepts an authority as a server"),
    }
    // Neither the name nor the authority is right for this server.
    let tls = TlsServer::start();
    let refused = async |host: &str, ca: PathBuf| {
        let target = Target {
            tls_ca: Some(ca),
            ..Target::plain(format!("https://{host}:{}", tls.port()))
        };
        match Client::connect(&target, CONNECT_LIMIT).await {
            Err(ClientError::BadCertificate { problem, .. }) => problem,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("the client accepts the certificate"),
        }
    };
    let other_name = refused("127.0.0.1", tls.file("ca.pem")).await;
    assert!(
        other_name.contains("not for the name 127.0.0.1: use one of its names: localhost"),
        "{other_name}"
    );
    let unknown = refused("localhost", tls.file("clients.pem")).await;
    assert!(unknown.contains("--tls-server-ca"), "{unknown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_past_its_deadline_is_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let options = Some(pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    });
    let many: Vec<pb::Pair> = (0..40).flat_map(|_| pairs()).collect();
    let number = many.len() as u64;
    let mut request = tonic::Request::new(pb::ScorePairsRequest {
        options,
        pairs: many,
    });
    request
        .metadata_mut()
        .insert("grpc-timeout", "8m".parse().unwrap());
    // tonic's own channel also applies the deadline of its requests, and may be first; this channel
    // only transmits it.
    let carrier = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let origin = server.address.parse().unwrap();
    let late = ScoringServiceClient::with_origin(carrier, origin)
        .score_pairs(request)
        .await
        .unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    // The work of the call has ended with it. Otherwise its pairs would be counted before these.
    score(&client, "models/tiny", pairs()).await;
    let scored = server.scored_pairs();
    assert!(scored < number, "{scored} of {number} pairs were scored");
    assert_eq!(counted(&server, "ScorePairs", "DeadlineExceeded"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_its_client_cancels_is_counted_as_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let many: Vec<pb::Pair> = (0..40).flat_map(|_| pairs()).collect();
    let mut patience = Duration::from_millis(8);
    until(
        "the count of a cancelled call",
        Duration::from_secs(60),
        async || {
            // The client may cancel before the call arrives, which is then not counted; so the call
            // is repeated, each time with more patience.
            let call = score(&client, "models/tiny", many.clone());
            let _ = tokio::time::timeout(patience, call).await;
            patience += Duration::from_millis(2);
            counted(&server, "ScorePairs", "Cancelled") > 0
        },
    )
    .await;
}

/// Returns the number of calls of a scoring method that the server counted under a code.
fn counted(server: &Server, method: &str, code: &str) -> u64 {
    let metrics = server.metrics();
    let counter = format!(
        "bradley_requests_total{{method=\"/bradley.v1.ScoringService/{method}\",code=\"{code}\"}} "
    );
    metrics
        .lines()
        .find_map(|l| l.strip_prefix(&counter))
        .map_or(0, |n| n.parse().unwrap())
}
