//! Requests and files that nobody should send, generated and mutated from a seed. Each gets an
//! answer with a reason, and the server continues to work.
//!
//! `BRADLEY_TEST_HOSTILE` is the number of cases of each kind, 100 by default. Of connections with
//! bytes that are no HTTP/2 there are a tenth as many.

use std::io::{Read, Write};
use std::time::Duration;

use bradley::rpc::pb;
use prost::Message;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng as StdRng;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::server::{Server, job, pairs, score, scored, upload};
use crate::support::golden;

/// Room for the keys and values of generated tokens. It also limits what a changed `max_tokens`
/// may cost.
const GENERATION_TOKENS: u32 = 1024;
/// The method that generates texts.
const GENERATE: &str = "GenerationService/GenerateCompletions";

/// Returns the number of cases of each kind.
pub fn number_of_cases() -> usize {
    std::env::var("BRADLEY_TEST_HOSTILE")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(100)
}

/// gRPC codec whose messages are raw bytes.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut all = vec![0; bytes::Buf::remaining(buffer)];
        bytes::Buf::copy_to_slice(buffer, &mut all);
        Ok(Some(all))
    }
}

/// Changes, inserts, repeats or cuts off some bytes.
pub fn mutate(rng: &mut StdRng, bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..=out.len());
        match rng.random_range(0..5) {
            0 if at < out.len() => out[at] = rng.random(),
            1 => out.truncate(at),
            2 => out.insert(at, rng.random()),
            3 => {
                let piece = out[at / 2..at].to_vec();
                out.splice(at..at, piece);
            }
            _ if at < out.len() => out[at] ^= 1 << rng.random_range(0..8),
            _ => {}
        }
    }
    out
}

/// Checks that an error has a reason and is not an internal one.
pub fn assert_has_reason(what: &str, e: &Status) {
    let reason = e.get_details_error_info().map(|i| i.reason);
    assert!(
        reason.is_some_and(|r| !r.is_empty() && r != "INTERNAL"),
        "{what}: {:?} {:?} has no reason",
        e.code(),
        e.message()
    );
    assert!(
        !matches!(e.code(), Code::Internal | Code::Unknown | Code::Cancelled),
        "{what}: {e}"
    );
}

/// Checks that an answer of GenerateCompletions is complete. `last` is its last message.
fn assert_is_whole_text(last: &[u8]) {
    let end = pb::GenerateCompletionsResponse::decode(last).unwrap();
    let usage = end.usage.unwrap_or_else(|| panic!("a text has no end"));
    assert!(usage.prompt_tokens > 0, "{usage:?}");
    // The last token of each of at most 64 samples takes no room.
    let most = GENERATION_TOKENS + 64;
    assert!((1..=most).contains(&usage.completion_tokens), "{usage:?}");
}

/// Returns the resident memory of a process in KiB.
pub fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status
        .lines()
        .find(|l| l.starts_with("VmRSS:"))
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_messages_and_files_get_a_reason_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let room = GENERATION_TOKENS.to_string();
    let flags = ["--generation-cache-tokens", room.as_str()];
    let server = Server::start_with(dir.path(), &models, &flags);
    let client = server.client().await;
    let dataset = upload(&client, "pairs.jsonl").await;
    let before = score(&client, "models/tiny", pairs()).await;
    let mut rng = StdRng::seed_from_u64(11);

    let options = Some(pb::ScoringOptions {
        policy: "models/tiny".into(),
        ..Default::default()
    });
    let chat = pairs()[0].prompt.clone();
    let seeds: Vec<(&str, Vec<u8>)> = vec![
        // Jobs are only validated: a job that is started would disturb the other cases.
        (
            "TrainingService/CreateTrainingJob",
            pb::CreateTrainingJobRequest {
                training_job: Some(job(&dataset.name, 1)),
                request_id: "r".into(),
                validate_only: true,
            }
            .encode_to_vec(),
        ),
        (
            "TrainingService/GetTrainingJob",
            pb::GetTrainingJobRequest {
                name: "trainingJobs/x".into(),
            }
            .encode_to_vec(),
        ),
        (
            "TrainingService/ListTrainingJobs",
            pb::ListTrainingJobsRequest {
                page_size: 3,
                page_token: "7".into(),
                states: vec![1, 2],
                own: true,
            }
            .encode_to_vec(),
        ),
        (
            "TrainingService/UpdateTrainingJob",
            pb::UpdateTrainingJobRequest {
                training_job: Some(pb::TrainingJob {
                    name: "trainingJobs/x".into(),
                    ..job(&dataset.name, 1)
                }),
                update_mask: None,
            }
            .encode_to_vec(),
        ),
        (
            "TrainingService/ListTrainingEvents",
            pb::ListTrainingEventsRequest {
                parent: "trainingJobs/x".into(),
                after_sequence: 1,
                page_size: 2,
            }
            .encode_to_vec(),
        ),
        (
            "DatasetService/GetDataset",
            pb::GetDatasetRequest {
                name: dataset.name.clone(),
            }
            .encode_to_vec(),
        ),
        (
            "CheckpointService/GetCheckpoint",
            pb::GetCheckpointRequest {
                name: "trainingJobs/x/checkpoints/1".into(),
            }
            .encode_to_vec(),
        ),
        (
            "ScoringService/ScorePairs",
            pb::ScorePairsRequest {
                options: options.clone(),
                pairs: pairs()[..1].to_vec(),
            }
            .encode_to_vec(),
        ),
        (
            "EvaluationService/EvaluatePolicy",
            pb::EvaluatePolicyRequest {
                options: options.clone(),
                dataset: dataset.name.clone(),
                subset_column: "prompt".into(),
                bins: 7,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            GENERATE,
            pb::GenerateCompletionsRequest {
                policy: "models/tiny".into(),
                prompt: chat.clone(),
                samples: 2,
                max_tokens: 4,
                temperature: Some(0.5),
                top_p: Some(0.9),
                top_k: Some(7),
                seed: Some(3),
                stop: vec!["end".into()],
                stop_token_ids: vec![4],
                logprobs: true,
                chat_template_kwargs_json: r#"{"style": "brief"}"#.into(),
                top_logprobs: 2,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            GENERATE,
            pb::GenerateCompletionsRequest {
                policy: "models/tiny".into(),
                prompt_token_ids: vec![5, 6, 7, 8],
                max_tokens: 3,
                ignore_eos: true,
                prompt_logprobs: true,
                top_logprobs: 1,
                token_texts: true,
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "ScoringService/ScoreCompletions",
            pb::ScoreCompletionsRequest {
                options,
                prompt: chat.clone(),
                completions: vec![chat.unwrap()],
            }
            .encode_to_vec(),
        ),
    ];
    let channel = tonic::transport::Endpoint::from_shared(server.address.clone())
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut texts = 0;
    // After a quarter of the rounds, when caches and pools are filled.
    let mut settled_kib = 0;
    for round in 0..number_of_cases() {
        for (method, seed) in &seeds {
            // The first round sends the messages unchanged.
            let body = if round == 0 {
                seed.clone()
            } else if rng.random_range(0..8) == 0 {
                (0..rng.random_range(0..200))
                    .map(|_| rng.random())
                    .collect()
            } else {
                mutate(&mut rng, seed)
            };
            // Leaves out a mutation that would start a job.
            if *method == "TrainingService/CreateTrainingJob"
                && pb::CreateTrainingJobRequest::decode(body.as_slice())
                    .is_ok_and(|r| !r.validate_only)
            {
                continue;
            }
            let mut grpc = tonic::client::Grpc::new(channel.clone());
            grpc.ready().await.unwrap();
            let path = format!("/bradley.v1.{method}").parse().unwrap();
            // An answer of several messages is read to its end.
            let call = async {
                let request = Request::new(body);
                let mut messages = grpc
                    .server_streaming(request, path, Raw)
                    .await?
                    .into_inner();
                let mut last = Vec::new();
                while let Some(message) = messages.message().await? {
                    last = message;
                }
                Ok::<_, Status>(last)
            };
            let answer = tokio::time::timeout(Duration::from_secs(30), call)
                .await
                .unwrap_or_else(|_| panic!("{method} hangs in round {round}"));
            match answer {
                Ok(last) if *method == GENERATE => {
                    assert_is_whole_text(&last);
                    texts += 1;
                }
                Ok(_) => {}
                Err(e) => assert_has_reason(method, &e),
            }
        }
        if round == number_of_cases() / 4 {
            settled_kib = resident_kib(server.pid());
        }
    }

    assert!(texts > 0, "every request for a text was refused");

    // Mutated JSONL, deep nesting, and JSONL between Parquet's magic bytes.
    let jsonl = std::fs::read(golden("pairs.jsonl")).unwrap();
    let file = dir.path().join("hostile");
    for i in 0..number_of_cases() {
        let body = match i % 4 {
            0 => "[".repeat(rng.random_range(1..100_000)).into_bytes(),
            1 => [b"PAR1".as_slice(), &mutate(&mut rng, &jsonl), b"PAR1"].concat(),
            _ => mutate(&mut rng, &jsonl),
        };
        std::fs::write(&file, body).unwrap();
        let sent = client.upload_dataset(
            &file,
            pb::UploadMetadata {
                model: "models/tiny".into(),
                ..Default::default()
            },
            |_| {},
        );
        match tokio::time::timeout(Duration::from_secs(30), sent)
            .await
            .expect("an upload is not answered")
        {
            Ok(d) => {
                client
                    .datasets()
                    .delete_dataset(pb::DeleteDatasetRequest { name: d.name })
                    .await
                    .unwrap();
            }
            Err(bradley::rpc::client::ClientError::Refused(e)) => assert_has_reason("upload", &e),
            Err(e) => panic!("{e}"),
        }
    }

    // Bytes that are no HTTP/2.
    let address = server.address.trim_start_matches("http://").to_owned();
    for _ in 0..number_of_cases() / 10 {
        let mut connection = std::net::TcpStream::connect(&address).unwrap();
        let bytes: Vec<u8> = (0..rng.random_range(1..2000))
            .map(|_| rng.random())
            .collect();
        let _ = connection.write_all(&bytes);
        connection
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let _ = connection.read(&mut [0; 64]);
    }

    let after = score(&client, "models/tiny", pairs()).await;
    for (a, b) in before.results.iter().zip(&after.results) {
        assert_eq!(scored(a), scored(b), "the scores have changed");
    }
    let grown = resident_kib(server.pid()).saturating_sub(settled_kib);
    assert!(grown < 64 << 10, "memory grew by {grown} KiB");
}
