//! Rows in the shapes of other tools, from the upload to the job.

use std::path::Path;
use std::sync::Arc;

use bradley::rpc::client::Client;
use bradley::rpc::pb;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::SchemaDescriptor;
use serde_json::{Value, json};

use crate::server::{Server, finish, get, job, submit};

async fn upload(client: &Client, file: &Path) -> pb::Dataset {
    client
        .upload_dataset(file, pb::UploadMetadata::default(), |_| {})
        .await
        .unwrap()
}

async fn upload_rows(client: &Client, dir: &Path, rows: &[Value]) -> pb::Dataset {
    let file = dir.join("rows.jsonl");
    std::fs::write(
        &file,
        rows.iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>(),
    )
    .unwrap();
    upload(client, &file).await
}

/// Returns the number of rows of each shape, sorted by the shape's name.
fn shapes(report: &pb::ValidationReport) -> Vec<(&str, u64)> {
    let mut shapes: Vec<(&str, u64)> = report
        .shapes
        .iter()
        .map(|(name, rows)| (name.as_str(), *rows))
        .collect();
    shapes.sort_unstable();
    shapes
}

async fn estimate(client: &Client, wanted: pb::TrainingJob) -> pb::EstimateTrainingJobResponse {
    let request = pb::EstimateTrainingJobRequest {
        training_job: Some(wanted),
    };
    client
        .training()
        .estimate_training_job(request)
        .await
        .unwrap()
        .into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_may_mix_shapes_and_a_row_may_make_several_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let mut rows = vec![
        json!({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}),
        json!({"chosen": "The sky is blue.", "rejected": "The sky is green."}),
        json!({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
               "rejected": "\n\nHuman: Hi\n\nAssistant: No."}),
        json!({"input": {"messages": [message("user", "Q")]},
               "preferred_output": [message("assistant", "a")],
               "non_preferred_output": [message("assistant", "b")]}),
        json!({"prompt": "R", "chosen": [message("user", "R"), message("assistant", "a")],
               "rejected": [message("user", "R"), message("assistant", "b")],
               "score_chosen": 8.0, "score_rejected": 3.0}),
        json!({"chosen": [message("user", "S"), message("assistant", "a")],
               "rejected": [message("user", "S"), message("assistant", "b")]}),
    ];
    for i in 0..14 {
        rows.push(json!({"id": i, "prompt": format!("{i}?"), "chosen": " yes",
                         "rejected": [" no", " never", " perhaps"]}));
    }
    let dataset = upload_rows(&client, dir.path(), &rows).await;
    let report = dataset.report.clone().unwrap();
    let expected = [
        ("hh", 1),
        ("implicit_prompt", 1),
        ("implicit_prompt_text", 1),
        ("openai_preference", 1),
        ("preference", 1),
        ("several_rejected", 14),
        ("ultrafeedback", 1),
    ];
    assert_eq!(shapes(&report), expected);
    assert_eq!((report.rows, report.valid_rows, report.pairs), (20, 20, 48));
    // The scores of UltraFeedback's row are not used.
    let mut unused: Vec<&str> = report
        .issues
        .iter()
        .map(|issue| issue.field.as_str())
        .collect();
    unused.sort_unstable();
    assert_eq!(
        (report.counts.len(), report.counts["ignored_field"], unused),
        (1, 2, vec!["score_chosen", "score_rejected"])
    );
    let request = pb::GetDatasetRequest {
        name: dataset.name.clone(),
    };
    assert_eq!(
        client
            .datasets()
            .get_dataset(request)
            .await
            .unwrap()
            .into_inner()
            .report
            .unwrap(),
        report
    );

    // A quarter of the rows, that is 5, is held out. Each of them has one pair or, with several
    // rejected answers, three.
    let mut wanted = job(&dataset.name, 2);
    wanted.evaluation = Some(pb::training_job::Evaluation::EvalFraction(0.25));
    let estimate = estimate(&client, wanted.clone()).await;
    assert_eq!(estimate.train_pairs + estimate.eval_pairs, 48);
    assert!(
        (5..=15).contains(&estimate.eval_pairs) && (estimate.eval_pairs - 5) % 2 == 0,
        "{estimate:?}"
    );
    let name = submit(&client, wanted).await;
    finish(&client, &name).await;
    let done = get(&client, &name).await;
    assert_eq!((done.state(), done.error), (pb::JobState::Succeeded, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn parquet_files_in_other_shapes_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let list = "(LIST) { repeated group list { required group element {
                    required binary role (UTF8); required binary content (UTF8); } } }";
    let openai = format!(
        "required group input {{ required group messages {list} }}
         required group preferred_output {list} required group non_preferred_output {list}"
    );
    let texts = "required binary chosen (UTF8); required binary rejected (UTF8);";
    let several = "required binary prompt (UTF8); required binary chosen (UTF8);
                   required group rejected (LIST) {
                       repeated group list { required binary element (UTF8); } }";
    let cases: [(&str, &str, &[&[&str]], u64); 4] = [
        (
            "openai_preference",
            &openai,
            &[
                &["user"],
                &["Q"],
                &["assistant"],
                &["a"],
                &["assistant"],
                &["b"],
            ],
            0,
        ),
        (
            "hh",
            texts,
            &[
                &["\n\nHuman: Hi\n\nAssistant: a"],
                &["\n\nHuman: Hi\n\nAssistant: b"],
            ],
            0,
        ),
        (
            "implicit_prompt_text",
            texts,
            &[&["It is so"], &["It is not"]],
            0,
        ),
        (
            "several_rejected",
            several,
            &[&["Q"], &["a"], &["b", "c"]],
            2,
        ),
    ];
    for (shape, schema, columns, pairs) in cases {
        let file = dir.path().join(shape);
        let schema = Arc::new(parse_message_type(&format!("message rows {{ {schema} }}")).unwrap());
        let leaves = SchemaDescriptor::new(schema.clone());
        let mut writer = SerializedFileWriter::new(
            std::fs::File::create(&file).unwrap(),
            schema,
            Arc::default(),
        )
        .unwrap();
        let mut group = writer.next_row_group().unwrap();
        let (mut columns, mut index) = (columns.iter(), 0);
        while let Some(mut column) = group.next_column().unwrap() {
            let values: Vec<ByteArray> = columns
                .next()
                .unwrap()
                .iter()
                .map(|text| ByteArray::from(*text))
                .collect();
            let leaf = leaves.column(index);
            index += 1;
            let definition_levels = vec![leaf.max_def_level(); values.len()];
            let repetition_levels: Vec<i16> = (0..values.len()).map(|i| i16::from(i > 0)).collect();
            column
                .typed::<ByteArrayType>()
                .write_batch(&values, Some(&definition_levels), Some(&repetition_levels))
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        let report = upload(&client, &file).await.report.unwrap();
        assert_eq!(shapes(&report), [(shape, 1)], "{report:?}");
        assert_eq!(
            (report.rows, report.valid_rows, report.pairs),
            (1, 1, pairs),
            "{report:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn skipped_rows_are_listed_although_warnings_fill_the_list_of_findings() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let client = server.client().await;
    let mut rows = vec![json!({"prompt": "1 2", "chosen": " 3", "rejected": " 4"}); 1001];
    rows.extend(
        (0..3).map(|i| json!({"prompt": format!("{i}"), "chosen": " same", "rejected": " same"})),
    );
    let dataset = upload_rows(&client, dir.path(), &rows).await;
    let report = dataset.report.clone().unwrap();
    assert!(
        report.issues.iter().all(|i| i.reason == "duplicate_pair"),
        "the warnings do not fill the list"
    );
    let mut wanted = job(&dataset.name, 1);
    wanted.row_policy = pb::RowPolicy::Skip.into();
    assert_eq!(estimate(&client, wanted.clone()).await.skipped_rows, 3);
    let name = submit(&client, wanted).await;
    finish(&client, &name).await;
    let done = get(&client, &name).await;
    assert_eq!(done.state(), pb::JobState::Succeeded);
    let rows: Vec<&str> = done
        .skipped_rows
        .iter()
        .map(|line| line.split(',').next().unwrap())
        .collect();
    assert_eq!(
        rows,
        ["row 1002", "row 1003", "row 1004"],
        "{:?}",
        done.skipped_rows
    );
}
