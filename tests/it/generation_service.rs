//! The generation service and its command through the real binary: streams, seeds, stop texts,
//! refused requests, clients that vanish, and jobs that train meanwhile.

use std::path::Path;
use std::time::Duration;

use bradley::rpc::client::{Client, Status};
use bradley::rpc::pb;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::backends::Proxy;
use crate::server::{
    Server, free_port, is_final, is_step, job, reason, state, submit, until_event, upload,
};
use crate::support::{binary, golden, tiny};
use crate::wait::until;

/// Returns a request for a plain prompt on the tiny model.
fn wanted(prompt: &str, samples: u32, max_tokens: u32) -> pb::GenerateCompletionsRequest {
    pb::GenerateCompletionsRequest {
        policy: "models/tiny".into(),
        prompt: Some(pb::Text {
            form: Some(pb::text::Form::Plain(prompt.into())),
        }),
        samples,
        max_tokens,
        seed: Some(7),
        ignore_eos: true,
        logprobs: true,
        ..Default::default()
    }
}

/// A sample as a client has received it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Received {
    text: String,
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    finish: Option<pb::FinishReason>,
}

/// Reads a stream to its end. Returns the samples, and the last response.
async fn receive(
    client: &Client,
    request: pb::GenerateCompletionsRequest,
) -> Result<(Vec<Received>, pb::GenerateCompletionsResponse), Status> {
    let mut samples = vec![Received::default(); request.samples.max(1) as usize];
    let answer = client.generation().generate_completions(request).await?;
    let mut stream = answer.into_inner();
    let mut last = None;
    while let Some(response) = stream.message().await? {
        for delta in &response.deltas {
            let sample = &mut samples[delta.index as usize];
            assert_eq!(sample.finish, None, "nothing follows the last token");
            sample.text.push_str(&delta.text);
            sample.ids.extend(&delta.token_ids);
            sample.log_probs.extend(&delta.token_logprobs);
            sample.finish = match delta.finish_reason() {
                pb::FinishReason::Unspecified => None,
                reason => Some(reason),
            };
        }
        last = Some(response);
    }
    Ok((samples, last.expect("there is no response")))
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_are_streamed_and_repeat_with_their_seed() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let request = wanted("What is the capital of France?", 3, 40);
    let (samples, last) = receive(&client, request.clone()).await.unwrap();
    assert_eq!(
        (last.policy_version.as_str(), last.seed),
        ("models/tiny", 7)
    );
    let usage = last.usage.unwrap();
    assert_eq!(usage.completion_tokens, 120);
    assert!(usage.prompt_tokens > 5);
    let (_, tokenizer) = tiny("llama");
    for sample in &samples {
        assert_eq!((sample.ids.len(), sample.log_probs.len()), (40, 40));
        assert_eq!(sample.finish, Some(pb::FinishReason::Length));
        assert_eq!(sample.text, tokenizer.decode_text(&sample.ids).unwrap());
    }
    assert_ne!(samples[0], samples[1]);
    // The same request gives the same samples beside others. With one sample it gives the first.
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 0..6 {
        let (client, mut other) = (client.clone(), request.clone());
        other.seed = Some(seed);
        tasks.spawn(async move { receive(&client, other).await.map(|(samples, _)| samples) });
    }
    assert_eq!(receive(&client, request.clone()).await.unwrap().0, samples);
    while let Some(other) = tasks.join_next().await {
        assert_ne!(other.unwrap().unwrap(), samples);
    }
    let one = wanted("What is the capital of France?", 1, 40);
    assert_eq!(
        receive(&client, one.clone()).await.unwrap().0[0],
        samples[0]
    );
    // A stop text ends the text before it. The tokens end with the one that completes it.
    let stop: String = samples[0].text.chars().skip(4).take(2).collect();
    let before = &samples[0].text[..samples[0].text.find(&stop).unwrap()];
    let stopped = pb::GenerateCompletionsRequest {
        stop: vec![stop.clone()],
        ..one.clone()
    };
    let (stopped, last) = receive(&client, stopped).await.unwrap();
    assert_eq!(stopped[0].text, before);
    assert_eq!(stopped[0].finish, Some(pb::FinishReason::Stop));
    assert!(samples[0].ids.starts_with(&stopped[0].ids));
    assert_eq!(
        last.usage.unwrap().completion_tokens as usize,
        stopped[0].ids.len()
    );
    // So does a token, which belongs to the sample.
    let token = samples[0].ids[9];
    let first = samples[0].ids.iter().position(|id| *id == token).unwrap();
    let stopped = pb::GenerateCompletionsRequest {
        stop_token_ids: vec![token],
        ..one
    };
    let (stopped, _) = receive(&client, stopped).await.unwrap();
    assert_eq!(stopped[0].ids, samples[0].ids[..=first]);
    assert_eq!(stopped[0].finish, Some(pb::FinishReason::Stop));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dialogue_is_rendered_and_wrong_fields_are_named_together() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(
        dir.path(),
        &format!("tiny={}", golden("models/llama").display()),
        &["--max-row-tokens", "300"],
    );
    let client = server.client().await;
    let chat = |content: &str| pb::Text {
        form: Some(pb::text::Form::Chat(pb::MessageList {
            messages: vec![pb::Message {
                role: "user".into(),
                content: content.into(),
                ..Default::default()
            }],
        })),
    };
    let rendered = "<|begin|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>\
                    <|start_header_id|>assistant<|end_header_id|>\n\n";
    let (of_chat, _) = receive(
        &client,
        pb::GenerateCompletionsRequest {
            prompt: Some(chat("hello")),
            ..wanted("", 1, 10)
        },
    )
    .await
    .unwrap();
    let (of_text, _) = receive(&client, wanted(rendered, 1, 10)).await.unwrap();
    assert_eq!(of_chat, of_text);
    let wrong = pb::GenerateCompletionsRequest {
        policy: "tiny".into(),
        samples: 65,
        temperature: Some(1e-39),
        top_p: Some(1e-46),
        top_k: Some(0),
        stop: vec![String::new()],
        ..wanted("x", 1, 1)
    };
    let e = receive(&client, wrong).await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument);
    let fields: Vec<String> = e
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|v| v.field)
        .collect();
    assert_eq!(
        fields,
        [
            "policy",
            "samples",
            "temperature",
            "top_p",
            "top_k",
            "stop[0]"
        ]
    );
    for (request, part) in [
        (wanted("x", 1, 300), "max_row_tokens"),
        (wanted("", 1, 1), "prompt"),
        (
            pb::GenerateCompletionsRequest {
                tools_json: r#"[{"type": "function", "function": {"name": "f"}}]"#.into(),
                ..wanted("x", 1, 1)
            },
            "applies only to chat messages",
        ),
        (
            pb::GenerateCompletionsRequest {
                policy: "models/other".into(),
                ..wanted("x", 1, 1)
            },
            "models/other",
        ),
    ] {
        match receive(&client, request).await {
            // The tokenizer adds a token to an empty text.
            Ok((samples, _)) => assert_eq!((part, samples.len()), ("prompt", 1)),
            Err(e) => assert!(e.message().contains(part), "{e}"),
        }
    }
}

/// Returns the fields that a status blames.
fn fields(e: &Status) -> Vec<String> {
    let request = e.get_details_bad_request();
    let violations = request.into_iter().flat_map(|r| r.field_violations);
    violations.map(|v| v.field).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lengths_are_checked_before_the_quota_and_only_possible_tokens_count() {
    let dir = tempfile::tempdir().unwrap();
    let models = format!(
        "tiny={},long={}",
        golden("models/llama").display(),
        golden("models/phi3-long").display()
    );
    let server = Server::start_with(
        dir.path(),
        &models,
        &["--max-scoring-tokens-per-client", "16500"],
    );
    let client = server.client().await;
    let request = wanted("Water boils", 1, 16000);
    let open = client.generation().generate_completions(request).await;
    let open = open.unwrap();
    for (request, field, setting) in [
        (
            wanted("x", 1, 4_000_000_000),
            "max_tokens",
            "max_row_tokens",
        ),
        (
            wanted("x", 64, 1000),
            "max_tokens",
            "generation_cache_tokens",
        ),
        (
            wanted(&"word ".repeat(20_000), 1, 1),
            "prompt",
            "max_row_tokens",
        ),
        (
            pb::GenerateCompletionsRequest {
                prompt: None,
                prompt_token_ids: vec![5; 20_000],
                ..wanted("", 1, 1)
            },
            "prompt_token_ids",
            "max_row_tokens",
        ),
    ] {
        let e = receive(&client, request).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{e}");
        assert_eq!(fields(&e), [field], "{e}");
        assert!(e.message().contains(setting), "{e}");
    }
    let e = receive(&client, wanted("x", 1, 1000)).await.unwrap_err();
    assert_eq!(reason(&e), "TOO_MANY_TOKENS");
    assert!(e.message().contains("to score or to generate"), "{e}");
    // The rotary frequencies of this model change after 50 tokens, so it makes no more.
    let short = pb::GenerateCompletionsRequest {
        policy: "models/long".into(),
        ..wanted("x", 1, 1000)
    };
    let (samples, _) = receive(&client, short).await.unwrap();
    assert!(samples[0].ids.len() < 50, "{samples:?}");
    drop(open);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_vanish_leave_nothing_behind_and_a_stopping_server_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start_with(
        dir.path(),
        &format!("tiny={}", golden("models/llama").display()),
        &["--generation-cache-tokens", "200000"],
    );
    let client = server.client().await;
    let mut streams = Vec::new();
    for seed in 0..12 {
        let request = pb::GenerateCompletionsRequest {
            seed: Some(seed),
            ..wanted("Water boils", 2, 6000)
        };
        let answer = client.generation().generate_completions(request).await;
        streams.push(answer.unwrap().into_inner());
    }
    assert!(streams[0].message().await.unwrap().is_some());
    assert!(server.metric("bradley_generation_cache_tokens") > Some(0.0));
    let mut kept = streams.remove(0);
    drop(streams);
    until(
        "the end of the others",
        Duration::from_secs(60),
        async || server.metric("bradley_generation_sequences") == Some(2.0),
    )
    .await;
    let reading = tokio::spawn(async move {
        loop {
            match kept.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(e) => return Some(e),
            }
        }
    });
    let status = server.terminate(Duration::from_secs(60));
    assert!(status.success(), "{status}");
    let e = reading
        .await
        .unwrap()
        .expect("the text ended before the server stopped");
    assert_eq!(e.code(), Code::Unavailable, "{e}");
    assert_eq!(reason(&e), "DRAINING");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_and_its_checkpoint_generate_while_it_trains() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let alone = receive(&client, wanted("Light travels", 2, 30))
        .await
        .unwrap()
        .0;
    let dataset = upload(&client, "pairs.jsonl").await;
    let mut long = job(&dataset.name, 100_000);
    long.run = Some(pb::RunConfig {
        save_steps: Some(3),
        save_total_limit: Some(1000),
        ..Default::default()
    });
    let name = submit(&client, long).await;
    until_event(&client, &name, |e| is_step(e, 4)).await;
    // The base model's samples do not depend on the training beside them.
    let beside = receive(&client, wanted("Light travels", 2, 30))
        .await
        .unwrap()
        .0;
    assert_eq!(beside, alone);
    let of = |policy: String| pb::GenerateCompletionsRequest {
        policy,
        ..wanted("Light travels", 1, 30)
    };
    let (live, last) = receive(&client, of(format!("{name}/checkpoints/latest")))
        .await
        .unwrap();
    let version = last.policy_version;
    let step = version.strip_prefix(&format!("{name}/checkpoints/latest@"));
    assert!(
        step.is_some_and(|step| step.parse::<u64>().unwrap() >= 4),
        "{version}"
    );
    assert_eq!(live[0].ids.len(), 30);
    let (stored, last) = receive(&client, of(format!("{name}/checkpoints/3")))
        .await
        .unwrap();
    assert_eq!(last.policy_version, format!("{name}/checkpoints/3"));
    assert_ne!(stored[0], alone[0]);
    assert!(
        !is_final(state(&client, &name).await),
        "the job ended too early"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_continues_a_prompt_and_the_prompts_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let run = |arguments: &[&str]| {
        std::process::Command::new(binary())
            .args(["generate", "--server", &server.address, "--policy", "tiny"])
            .args(["--max-tokens", "12", "--seed", "5", "--ignore-eos"])
            .args(arguments)
            .output()
            .unwrap()
    };
    let printed = run(&["--prompt", "Bread needs", "--plain"]);
    assert!(printed.status.success(), "{printed:?}");
    let request = pb::GenerateCompletionsRequest {
        seed: Some(5),
        ..wanted("Bread needs", 1, 12)
    };
    let (want, _) = receive(&server.client().await, request).await.unwrap();
    assert_eq!(
        String::from_utf8(printed.stdout).unwrap(),
        format!("{}\n", want[0].text)
    );
    let (prompts, out) = (
        dir.path().join("prompts.jsonl"),
        dir.path().join("out.jsonl"),
    );
    let lines = "{\"id\": \"a\", \"prompt\": \"Name a colour.\"}\n\n\
                 {\"id\": \"b\", \"prompt\": [{\"role\": \"user\", \"content\": \"hello\"}]}\n";
    std::fs::write(&prompts, lines).unwrap();
    let files = [
        "--data",
        prompts.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    let written = run(&[&files[..], &["--samples", "2"]].concat());
    assert!(written.status.success(), "{written:?}");
    let rows: Vec<serde_json::Value> = std::fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (rows.len(), &rows[0]["id"], &rows[1]["id"]),
        (2, &"a".into(), &"b".into())
    );
    for row in &rows {
        let samples = row["samples"].as_array().unwrap();
        assert_eq!(samples.len(), 2);
        assert!(
            samples
                .iter()
                .all(|s| s["tokens"] == 12 && s["finish_reason"] == "length")
        );
        assert!(samples.iter().all(|s| s["logprob"].as_f64().unwrap() < 0.0));
    }
    let refused = |arguments: &[&str], parts: &[&str]| {
        let wrong = run(arguments);
        let message = String::from_utf8(wrong.stderr).unwrap();
        assert!(!wrong.status.success(), "{message}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
    };
    // The input and complete results are never replaced by an error.
    let complete = std::fs::read(&out).unwrap();
    let data = ["--data", files[1], "--out", files[1]];
    refused(&data, &["would replace a file of --data"]);
    assert_eq!(std::fs::read_to_string(&prompts).unwrap(), lines);
    let many = "{\"prompt\": \"x\"}\n".repeat(3) + "{\"prompt\": [3]}\n";
    std::fs::write(&prompts, many).unwrap();
    refused(
        &files,
        &["row 4: ", "out.jsonl.part has the first 3 results"],
    );
    let part = std::fs::read_to_string(dir.path().join("out.jsonl.part")).unwrap();
    assert_eq!(part.lines().count(), 3);
    // The next start replaces it, but no file of somebody else.
    refused(&files, &["out.jsonl.part has the first 3 results"]);
    let part = dir.path().join("out.jsonl.part");
    std::fs::write(&part, "mine\n").unwrap();
    refused(&files, &["out.jsonl.part is not of bradley generate"]);
    assert_eq!(std::fs::read_to_string(&part).unwrap(), "mine\n");
    std::fs::remove_file(&part).unwrap();
    std::fs::write(&prompts, "{\"id\": \"a\", \"prompt\": 3}\n").unwrap();
    refused(&files, &["row 1: prompt is a number"]);
    std::fs::write(&prompts, "{\"seed\": 1, \"prompt\": \"x\"}\n").unwrap();
    refused(&files, &["row 1: the column seed cannot be copied"]);
    std::fs::write(&prompts, "").unwrap();
    refused(&files, &["has no prompts"]);
    std::fs::write(&prompts, "{\"ask\": \"x\", \"note\": 1}\n").unwrap();
    let found = "found: ask, note; --columns prompt=NAME reads the column NAME as prompt";
    refused(&files, &[found]);
    std::fs::write(&prompts, "{\"prompt\": \"x\"}\n").unwrap();
    let cold = [&files[..], &["--temperature", "-1"]].concat();
    refused(&cold, &["error: --temperature is -1"]);
    let none = [&files[..], &["--samples", "0"]].concat();
    refused(&none, &["a whole number, at least 1"]);
    assert_eq!(std::fs::read(&out).unwrap(), complete);

    // CSV, compressed and with another name of the prompt's column. All columns are copied.
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packed, b"ask,note\nx,01\ny,2\n").unwrap();
    std::fs::write(&prompts, packed.finish().unwrap()).unwrap();
    let printed = run(&["--data", files[1], "--columns", "prompt=ask"]);
    let message = String::from_utf8_lossy(&printed.stderr);
    assert!(printed.status.success(), "{message}");
    let rows: Vec<serde_json::Value> = String::from_utf8(printed.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&rows[0]["prompt"], &rows[0]["note"]),
        (&"x".into(), &"01".into())
    );
    assert_eq!(
        (&rows[1]["note"], &rows[1]["seed"]),
        (&"2".into(), &6.into())
    );
}

/// Prompts of a file are sent again while the server is not there, and a seed that is not given is
/// the same in all attempts of a row.
#[tokio::test(flavor = "multi_thread")]
async fn the_prompts_of_a_file_survive_a_restart_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let models = format!("tiny={}", golden("models/llama").display());
    let data_dir = dir.path().join("data");
    let mut server = Server::start_with(&data_dir, &models, &["--listen", &listen]);
    let prompts = dir.path().join("prompts.jsonl");
    std::fs::write(&prompts, "{\"prompt\": \"x\"}\n".repeat(200)).unwrap();
    let out = dir.path().join("out.jsonl");
    let part = dir.path().join("out.jsonl.part");
    let has_result = |part: &Path| std::fs::read_to_string(part).is_ok_and(|text| !text.is_empty());
    // After a result nothing passes, so that prompts are left when the server is killed.
    let proxy = Proxy::in_front_of(&server.address);
    let written = part.clone();
    proxy.hold_while(move || has_result(&written));
    let mut command = std::process::Command::new(binary())
        .args(["generate", "--server", &proxy.url(), "--policy", "tiny"])
        .args(["--max-tokens", "100", "--ignore-eos", "--data"])
        .arg(&prompts)
        .arg("--out")
        .arg(&out)
        .spawn()
        .unwrap();
    until("a first result", Duration::from_secs(60), async || {
        has_result(&part)
    })
    .await;
    server.kill();
    assert!(!out.exists(), "no prompt is left");
    proxy.release();
    let server = Server::start_with(&data_dir, &models, &["--listen", &listen]);
    let status = tokio::task::block_in_place(|| command.wait().unwrap());
    assert!(status.success());
    drop(server);
    let text = std::fs::read_to_string(&out).unwrap();
    let seeds: Vec<u64> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|row| row["seed"].as_u64().unwrap())
        .collect();
    assert_eq!(seeds.len(), 200);
    assert!(
        seeds.windows(2).all(|w| w[1] == w[0].wrapping_add(1)),
        "{seeds:?}"
    );
    assert!(!part.exists());
}
