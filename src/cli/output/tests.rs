#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use unicode_width::UnicodeWidthStr;

use super::table::{elide, render, render_sections};
use super::*;

fn widest(text: &str) -> usize {
    text.lines().map(UnicodeWidthStr::width).max().unwrap()
}

#[test]
fn a_model_shows_what_is_supported() {
    let mut of_text = pb::Model::default();
    for name in ["TRAIN_LORA", "TRAIN_FULL", "SCORE", "EXPORT"] {
        let of_model = pb::ModelUse::from_str_name(&format!("MODEL_USE_{name}")).unwrap();
        of_text.uses.push(of_model.into());
    }
    assert_eq!(supported(&of_text), "train lora, train full, score, export");
    of_text.uses.remove(1);
    of_text.text_only = true;
    assert_eq!(supported(&of_text), "train lora, score, export, text only");
}

#[test]
fn a_sentence_fits_the_terminal_and_is_whole_without_one() {
    let text = "12 pairs from 24 prompts, 816 tokens, seed 3\nleft out: 9 with fewer than two \
                different complete answers, 2 with answers that cannot be scored, 1 near tie";
    let shown = fitted(text, Some(80));
    assert_eq!(shown.lines().count(), 3, "{shown}");
    assert!(widest(&shown) < 80, "{shown}");
    assert!(
        shown.split_whitespace().eq(text.split_whitespace()),
        "{shown}"
    );
    assert_eq!(fitted(text, None), text);
    assert_eq!(fitted("", Some(80)), "");
}

/// Returns a job as a server returns it.
fn job() -> pb::TrainingJob {
    let hash = |digit: &str| digit.repeat(64);
    pb::TrainingJob {
        name: "trainingJobs/0193c8e4-7a3f-7000-8000-000000000000".into(),
        state: pb::JobState::Running.into(),
        dpo: Some(pb::DpoConfig {
            losses: ["sigmoid", "sft"]
                .map(|name| pb::WeightedLoss {
                    loss_type: name.into(),
                    weight: Some(0.5),
                    ..Default::default()
                })
                .to_vec(),
            beta: Some(0.1),
            ..Default::default()
        }),
        optimizer: Some(pb::OptimizerConfig {
            learning_rate: Some(1e-5),
            ..Default::default()
        }),
        method: Some(pb::training_job::Method::Lora(pb::LoraConfig {
            rank: Some(16),
            target_modules: vec!["q_proj".into(), "v_proj".into()],
            ..Default::default()
        })),
        batch: Some(pb::BatchConfig {
            batch_size: Some(8),
            epochs: Some(3.0),
            ..Default::default()
        }),
        seed: Some(42),
        precision: "bf16".into(),
        progress: Some(pb::JobProgress {
            step: 3,
            total_steps: 12,
            epoch: 0.75,
            eta_seconds: Some(244.0),
            ..Default::default()
        }),
        pins: Some(pb::JobPins {
            base: Some(pb::ModelIdentity {
                weights: hash("a"),
                ..Default::default()
            }),
            dataset: hash("d"),
            ..Default::default()
        }),
        latest_metrics: BTreeMap::from([("loss".into(), 0.5)]),
        skipped_rows: vec!["row 7: empty_completion".into(); 2],
        ..Default::default()
    }
}

/// Returns the value of a field in a rendered view.
fn shown<'a>(view: &'a str, field: &str) -> Option<&'a str> {
    view.lines().find_map(|line| {
        let line = line.trim_matches(['│', ' ']);
        let rest = line.strip_prefix(field)?;
        rest.starts_with("  ").then(|| rest.trim())
    })
}

#[test]
fn a_job_shows_its_settings_and_the_beginning_of_hashes() {
    let value = message(&job(), FieldSelection::Set).unwrap();
    assert_eq!(value["pins"]["dataset"], "d".repeat(64));
    let view = render_sections(&job_sections(&job(), &value), Some(80));
    assert!(widest(&view) <= 80, "{view}");
    for (field, text) in [
        ("state", "running"),
        ("progress", "step 3 of 12, epoch 0.75"),
        ("time left", "4 min"),
        ("dpo.losses", "sigmoid=0.5,sft=0.5"),
        ("dpo.beta", "0.1"),
        ("optimizer.learning_rate", "0.00001"),
        ("lora.rank", "16"),
        ("lora.target_modules", "q_proj, v_proj"),
        ("batch.batch_size", "8"),
        ("batch.epochs", "3"),
        ("seed", "42"),
        ("precision", "bf16"),
        ("loss", "0.5"),
        ("base.weights", "aaaaaaaaaaaa"),
        ("dataset", "dddddddddddd"),
        ("rows left out", "2 below"),
    ] {
        assert_eq!(shown(&view, field), Some(text), "{field} in\n{view}");
    }
    assert!(view.ends_with("rows left out:\n  row 7: empty_completion\n  row 7: empty_completion"));
    assert_eq!(shown(&view, "reference"), None, "{view}");
    let logged = json!({"logged_check": "warn"});
    let whole = json!({"reference": "logged", "logged_check": "warn", "name": "x"});
    assert_eq!(settings(&whole), logged);
    let full = settings(&json!({"full": {}, "name": "x"}));
    assert_eq!(
        shown(&render_sections(&[section("s", &full)], None), "full"),
        Some("yes")
    );
    assert_eq!(flat::readable("labels", &serde_json::json!({})), "");
}

#[test]
fn findings_have_a_line_each_with_their_severity() {
    let issue = pb::RowIssue {
        row: 4,
        field: "chosen".into(),
        reason: "empty_completion".into(),
        message: "has no text ".repeat(20),
        severity: pb::IssueSeverity::Error.into(),
        ..Default::default()
    };
    let dataset = pb::Dataset {
        size_bytes: 3 << 20,
        report: Some(pb::ValidationReport {
            issues: vec![issue],
            ..Default::default()
        }),
        ..Default::default()
    };
    let value = message(&dataset, FieldSelection::Set).unwrap();
    assert_eq!(
        value["report"]["issues"][0]["severity"],
        "ISSUE_SEVERITY_ERROR"
    );
    let view = render_sections(&[section("field", &value)], Some(60));
    assert_eq!(shown(&view, "size_bytes"), Some("3.0 MiB"));
    assert!(
        view.contains("\n  row 4: error chosen empty_completion: has no text has"),
        "{view}"
    );
}

#[test]
fn tables_fit_their_width_and_have_whole_values_where_there_is_room() {
    let header = ["name", "state", "title"];
    let rows = vec![
        vec![
            "trainingJobs/0193c8e4-7a3f-7000-8000-000000000001".to_owned(),
            "running".to_owned(),
            "β of the first 試験 ".repeat(12),
        ],
        vec![
            "trainingJobs/0193c8e4-7a40-7000-8000-000000000002".to_owned(),
            "failed".to_owned(),
            "short".to_owned(),
        ],
    ];
    let whole = render(&header, rows.clone(), None);
    assert!(
        whole.contains(&rows[0][0]) && whole.contains(rows[0][2].trim_end()),
        "{whole}"
    );
    for width in [40, 60, 80, 120] {
        let text = render(&header, rows.clone(), Some(width));
        assert!(widest(&text) <= width, "{width}:\n{text}");
        // The beginning of an ID that commands accept.
        assert!(
            text.contains(" 0193c8e4-7a3f ") && text.contains('…'),
            "{text}"
        );
    }
    assert_eq!(render(&header, rows.clone(), Some(1000)), whole);
    // Two IDs of the same millisecond stay apart.
    let mut twins = rows.clone();
    twins[1][0] = "trainingJobs/0193c8e4-7a3f-7000-8000-000000000002".to_owned();
    let text = render(&header, twins, Some(90));
    assert!(text.contains("000001") && text.contains("000002"), "{text}");
    let many = render(&header, rows, Some(30));
    assert!(
        widest(&many) <= 30 && many.ends_with("not shown: title"),
        "{many}"
    );
}

#[test]
fn names_of_columns_that_are_left_out_fit_the_terminal() {
    let header: Vec<String> = (0..20)
        .map(|i| format!("eval_rewards/margins{i}"))
        .collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let row = vec!["0.123456789".to_owned(); header.len()];
    let text = render(&header, vec![row], Some(60));
    assert!(widest(&text) <= 60, "{text}");
    let (_, left_out) = text.split_once("\nnot shown: ").unwrap();
    assert!(
        left_out.lines().count() > 2 && left_out.ends_with("eval_rewards/margins19"),
        "{text}"
    );
}

#[test]
fn lists_of_models_and_of_times_fit_80_columns_without_cuts() {
    let header = ["name", "architecture", "parameters", "context", "dtype"];
    let row = [
        "models/SmolLM2-135M-Instruct.Q4_1",
        "llama",
        "135M",
        "8192",
        "q4_1",
    ];
    let models = render(&header, vec![row.map(str::to_owned).to_vec()], Some(80));
    assert!(
        models.contains("│ SmolLM2-135M-Instruct.Q4_1   "),
        "{models}"
    );
    let header = ["name", "title", "rows", "usable", "size", "created"];
    let row = [
        "datasets/01a229b6-cf56-743a-b71a-d1a8adc6a991",
        "good.jsonl.gz",
        "24",
        "24",
        "21.0 KiB",
        "2026-11-29T23:49:36Z",
    ];
    let row = row.map(str::to_owned).to_vec();
    let datasets = render(&header, vec![row.clone()], Some(80));
    assert!(datasets.contains(" 2026-11-29 23:49 "), "{datasets}");
    assert!(widest(&models) <= 80 && widest(&datasets) <= 80);
    assert!(!format!("{models}{datasets}").contains('…'));
    let header = [
        "name",
        "state",
        "steps",
        "policy",
        "title",
        "created",
        "replica",
        "last event",
    ];
    let row = [
        "trainingJobs/01a229c0-063a-7709-b9d5-3d34b49fbecd",
        "running",
        "0/1",
        "models/tiny",
        "beta=0.1",
        "2026-11-29T23:59:40Z",
        "bradley-0",
        "3 s ago",
    ];
    let row = row.map(str::to_owned).to_vec();
    let jobs = render(&header, vec![row.clone()], Some(80));
    assert!(
        jobs.contains(" tiny ") && jobs.contains(" 2026-11-29 23:59 "),
        "{jobs}"
    );
    assert!(widest(&jobs) <= 80 && !jobs.contains('…'), "{jobs}");
    // Where there is room, times are whole.
    assert!(render(&header, vec![row], Some(200)).contains("2026-11-29T23:59:40Z"));
}

#[test]
fn a_terminal_shows_the_first_lines_of_a_long_list() {
    let mut one = Section::new("field");
    let lines: Vec<String> = (1..=30).map(|i| format!("row {i}")).collect();
    one.fields
        .push(("report.issues".to_owned(), Shown::Lines(lines)));
    let on_terminal = render_sections(std::slice::from_ref(&one), Some(80));
    assert!(
        on_terminal.ends_with("row 20\n  and 10 more: --format json shows all"),
        "{on_terminal}"
    );
    assert!(on_terminal.contains("30 below"), "{on_terminal}");
    let in_file = render_sections(&[one], None);
    assert!(in_file.ends_with("row 30"), "{in_file}");
}

#[test]
fn long_values_are_cut_in_their_middle() {
    assert_eq!(elide("abcdefgh", 8), "abcdefgh");
    assert_eq!(elide("abcdefgh", 5), "ab…gh");
    assert_eq!(elide("abcdefgh", 4), "ab…h");
    assert_eq!(elide("試験試験", 5), "試…験");
    assert_eq!(elide("abc", 0), "…");
    let long = "x".repeat(100);
    let mut one = Section::new("field");
    one.add("error", format!("{long}!"));
    let view = render_sections(std::slice::from_ref(&one), Some(50));
    assert!(view.ends_with(&format!("error: {long}!")), "{view}");
    assert!(!render_sections(&[one], None).contains('…'));
}

#[test]
fn csv_has_a_column_for_every_path() {
    let items = [
        json!({"name": "a", "dpo": {"beta": 0.1}, "labels": {"x": "1,2"}}),
        json!({"name": "b", "list": ["q", "v"]}),
    ];
    assert_eq!(
        flat::csv(None, &items),
        "name,dpo.beta,labels.x,list\na,0.1,\"1,2\",\nb,,,\"[\"\"q\"\",\"\"v\"\"]\"\n"
    );
    assert_eq!(flat::csv(Some(&["b", "name"]), &items), "b,name\n,a\n,b\n");
    assert_eq!(flat::csv(None, &[]), "");
    assert_eq!(flat::at(&items[0], "dpo.beta"), Some(&json!(0.1)));
    let dotted = json!({"m": {"a.b": 1, "a": {"c": 2}}});
    assert_eq!(flat::at(&dotted, "m.a.b"), Some(&json!(1)));
    assert_eq!(flat::at(&dotted, "m.a.c"), Some(&json!(2)));
    assert_eq!(flat::at(&dotted, "m.x"), None);
}
