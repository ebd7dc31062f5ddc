//! Tests of every row shape. Implicit prompts are compared with TRL's own results.

use std::io::Write;

use super::super::read_rows;
use super::*;
use crate::domain::dataset::{ChatMessage, DatasetFormat, Text};

fn all(rows: &[Value]) -> Vec<Result<PreferenceRow, RowIssue>> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for row in rows {
        writeln!(file, "{row}").unwrap();
    }
    read_rows(file.path(), DatasetFormat::Jsonl)
        .unwrap()
        .collect()
}

fn one(row: Value) -> PreferenceRow {
    let mut rows = all(std::slice::from_ref(&row));
    assert_eq!(rows.len(), 1, "{row}");
    rows.remove(0).unwrap()
}

fn refusal(row: Value) -> (String, IssueReason, String) {
    let mut rows = all(std::slice::from_ref(&row));
    assert_eq!(rows.len(), 1, "{row}");
    let issue = rows.remove(0).unwrap_err();
    (issue.field, issue.reason, issue.message)
}

fn chat(messages: &[(&str, &str)]) -> Text {
    let message = |(role, content): &(&str, &str)| ChatMessage::new(*role, *content);
    Text::Chat(messages.iter().map(message).collect())
}

fn texts(row: &PreferenceRow) -> [&Text; 3] {
    [&row.prompt, &row.chosen, &row.rejected]
}

fn golden(cases: &str) -> Vec<Value> {
    let text = std::fs::read_to_string("tests/goldens/shapes.json").unwrap();
    let mut golden: Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(golden[cases].take()).unwrap()
}

#[test]
fn texts_without_a_prompt_are_split_as_trl_splits_them() {
    let (mut split, mut refused) = (0, 0);
    for case in golden("texts") {
        let (row, expected) = (&case["row"], &case["split"]);
        let first = |field: &str| row[field].as_str().unwrap().chars().next();
        // There is no common prompt. (TRL's index wraps around in this case.)
        if expected["prompt"] == "" || first("chosen") != first("rejected") {
            assert_eq!(
                refusal(row.clone()).1,
                IssueReason::DifferentPrompts,
                "{case}"
            );
            refused += 1;
            continue;
        }
        let got = one(row.clone());
        let plain = |field: &str| Text::Plain(expected[field].as_str().unwrap().to_owned());
        assert_eq!(
            texts(&got),
            [&plain("prompt"), &plain("chosen"), &plain("rejected")],
            "{case}"
        );
        assert_eq!(got.shape, RowShape::ImplicitPromptText);
        split += 1;
    }
    assert!(split > 150 && refused > 10, "{split} {refused}");
}

#[test]
fn a_prompt_that_repeats_the_first_user_message_gives_way_to_the_dialogues() {
    for case in golden("dialogues") {
        let got = one(case["row"].clone());
        assert_eq!(got.shape, RowShape::Ultrafeedback);
        for (field, text) in ["prompt", "chosen", "rejected"]
            .into_iter()
            .zip(texts(&got))
        {
            assert_eq!(
                serde_json::to_value(text).unwrap(),
                case["split"][field],
                "{case}"
            );
        }
        // Add the other columns of the dataset after which the shape is named.
        let mut row = case["row"].clone();
        row["score_chosen"] = json!(8.5);
        row["score_rejected"] = json!(3);
        row["messages"] = row["chosen"].clone();
        row["prompt_id"] = json!("f0e3");
        let mut scored = one(row);
        scored.ignored.sort_unstable();
        assert_eq!(
            std::mem::take(&mut scored.ignored),
            ["messages", "prompt_id", "score_chosen", "score_rejected"]
        );
        assert_eq!(scored, got);
        let mut row = case["row"].clone();
        row["prompt"] = json!("Another question?");
        assert_eq!(
            refusal(row).1,
            IssueReason::InvalidType,
            "a prompt of plain text that is in no dialogue"
        );
    }
}

#[test]
fn a_row_without_a_prompt_lists_its_columns() {
    let (field, reason, message) =
        refusal(json!({"question_text": "Q", "chosen": "a", "rejected": "b"}));
    assert_eq!((&*field, reason), ("prompt", IssueReason::DifferentPrompts));
    assert!(
        message.contains("add a prompt; found: question_text, chosen, rejected; "),
        "{message}"
    );
    let answer = json!([{"role": "assistant", "content": "a"}]);
    let (field, reason, message) =
        refusal(json!({"Prompt": "Q", "chosen": answer, "rejected": "b"}));
    assert_eq!((&*field, reason), ("prompt", IssueReason::MissingField));
    assert!(
        message.ends_with("; did you mean prompt instead of Prompt?"),
        "{message}"
    );
}

#[test]
fn the_columns_that_pandas_writes_as_objects_are_recognised() {
    let (field, reason, message) = refusal(json!({
        "prompt": {"0": "p", "1": "q"},
        "chosen": {"0": "a", "1": "b"},
        "rejected": {"0": "c", "1": "d"},
    }));
    assert_eq!((&*field, reason), ("prompt", IssueReason::InvalidType));
    assert!(
        message.contains("orient='records', lines=True"),
        "{message}"
    );
    let (_, _, message) = refusal(json!({"prompt": {"a": 1}, "chosen": "a", "rejected": "b"}));
    assert_eq!(
        message,
        "prompt is an object: use a string or a list of messages"
    );
}

#[test]
fn questions_with_plain_answers_become_dialogues() {
    let row = one(json!({"system": "Be brief.", "question": "Q", "chosen": "a", "rejected": "b"}));
    let prompt = chat(&[("system", "Be brief."), ("user", "Q")]);
    let answers = [chat(&[("assistant", "a")]), chat(&[("assistant", "b")])];
    assert_eq!(texts(&row), [&prompt, &answers[0], &answers[1]]);
    assert_eq!((row.shape, row.has_system_column), (RowShape::Orca, true));
    let row = one(json!({"system": "", "question": "Q", "chosen": "a", "rejected": "b"}));
    assert_eq!(row.prompt, chat(&[("user", "Q")]));
    assert!(!row.has_system_column && row.ignored.is_empty());
    let rows = all(&[json!({"question": "Q", "chosen": "a", "rejected": ["b", "c"]})]);
    let second = rows[1].as_ref().unwrap();
    assert_eq!(second.rejected, chat(&[("assistant", "c")]));
    assert_eq!(second.shape, RowShape::SeveralRejected);
    // With a prompt, the question is another column.
    let row = one(json!({"prompt": "P", "question": "Q", "chosen": "a", "rejected": "b"}));
    assert_eq!(
        (row.shape, &row.ignored[..]),
        (RowShape::Preference, &["question".into()][..])
    );
    let (field, reason, _) = refusal(json!({"question": "Q", "chosen": "a"}));
    assert_eq!(
        (field.as_str(), reason),
        ("rejected", IssueReason::MissingField)
    );
}

#[test]
fn a_system_column_is_used_in_dialogues_and_refused_elsewhere() {
    let answers = |prompt: Value, system: Value| {
        json!({
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "system": system,
        })
    };
    let user = json!({"role": "user", "content": "Q"});
    let expected = chat(&[("system", "S"), ("user", "Q")]);
    assert_eq!(one(answers(json!([user]), json!("S"))).prompt, expected);
    let own = json!({"role": "system", "content": "S"});
    assert_eq!(
        one(answers(json!([own, user]), json!("S"))).prompt,
        expected
    );
    let (field, _, message) = refusal(answers(json!([own, user]), json!("T")));
    assert_eq!(field, "system");
    assert!(
        message.contains("differs from the system message"),
        "{message}"
    );
    let (_, reason, message) = refusal(answers(json!([user]), json!(["S"])));
    assert_eq!(reason, IssueReason::InvalidType, "{message}");
    // Whole dialogues without a prompt get it, too.
    let dialogue = |answer: &str| json!([user, {"role": "assistant", "content": answer}]);
    let row = json!({"chosen": dialogue("a"), "rejected": dialogue("b"), "system": "S"});
    assert_eq!(one(row).prompt, expected);
    let plain = json!({"prompt": "p", "chosen": "a", "rejected": "b", "system": "S"});
    let (field, reason, message) = refusal(plain);
    assert_eq!(
        (field.as_str(), reason),
        ("system", IssueReason::UnsupportedField)
    );
    assert!(
        message.contains("rename the column of the prompt to question"),
        "{message}"
    );
}

#[test]
fn a_misspelt_column_is_named() {
    let (field, _, message) = refusal(json!({"prompt": "p", "choosen": "a", "rejected": "b"}));
    assert_eq!(field, "chosen");
    assert_eq!(
        message,
        "chosen is missing; found: prompt, choosen, rejected; did you mean chosen instead of \
         choosen?"
    );
}

#[test]
fn dialogues_and_plain_rows_keep_their_names() {
    let dialogue = |answer: &str| {
        json!([
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": answer}
        ])
    };
    assert_eq!(
        one(json!({"chosen": dialogue("a"), "rejected": dialogue("b")})).shape,
        RowShape::ImplicitPrompt
    );
    assert_eq!(
        one(json!({"prompt": null, "chosen": dialogue("a"), "rejected": dialogue("b")})).shape,
        RowShape::ImplicitPrompt
    );
    assert_eq!(
        one(json!({"prompt": "Q", "chosen": "a", "rejected": "b"})).shape,
        RowShape::Preference
    );
    let (field, reason, message) = refusal(json!({"question": "Q", "response": "a"}));
    assert_eq!(
        (field.as_str(), reason),
        ("chosen", IssueReason::MissingField)
    );
    assert!(
        message.contains("prompt, chosen and rejected") && message.contains("preferred_output"),
        "{message}"
    );
}

#[test]
fn openais_rows_are_read() {
    let messages = |role: &str, content: &str| json!([{"role": role, "content": content}]);
    let row = json!({
        "id": 7,
        "input": {"messages": messages("user", "Hello, how cold is San Francisco today?"),
            "tools": [], "parallel_tool_calls": true},
        "preferred_output": messages("assistant", "Today it is 13 °C there."),
        "non_preferred_output": messages("assistant", "It is not particularly cold."),
    });
    let got = one(row.clone());
    assert_eq!(
        (got.shape, got.id.as_deref(), got.weight),
        (RowShape::OpenaiPreference, Some("7"), 1.0)
    );
    assert_eq!(
        got.prompt,
        chat(&[("user", "Hello, how cold is San Francisco today?")])
    );
    assert_eq!(
        got.chosen,
        chat(&[("assistant", "Today it is 13 °C there.")])
    );
    assert_eq!(
        got.rejected,
        chat(&[("assistant", "It is not particularly cold.")])
    );
    assert!(got.ignored.is_empty());

    // Findings use the column names of the file.
    let mut missing = row.clone();
    missing["non_preferred_output"] = json!(null);
    let (field, reason, message) = refusal(missing);
    assert_eq!(
        (field.as_str(), reason),
        ("non_preferred_output", IssueReason::MissingField)
    );
    assert!(
        message.starts_with("non_preferred_output is missing"),
        "{message}"
    );
    let mut wrong = row.clone();
    wrong["preferred_output"] = json!(3);
    let (field, _, message) = refusal(wrong);
    assert!(
        field == "preferred_output" && message.starts_with("preferred_output is a number"),
        "{field}: {message}"
    );
    for (input, field) in [
        (json!("Hello"), "input"),
        (json!({"messages": null}), "input.messages"),
        (json!(null), "input"),
    ] {
        let mut wrong = row.clone();
        wrong["input"] = input;
        assert_eq!(refusal(wrong).0, field);
    }
    let mut wrong = row;
    wrong["input"]["messages"][0]["content"] = json!(false);
    assert_eq!(refusal(wrong).0, "input.messages");
}

#[test]
fn openais_tools_become_the_rows() {
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let mut fields = json!({
        "input": {"messages": [{"role": "user", "content": "Q"}], "tools": tools,
            "chat_template_kwargs": {"a": 1}, "weight": 9},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    });
    let fields = fields.as_object_mut().unwrap();
    assert_eq!(normalise(1, fields).unwrap(), RowShape::OpenaiPreference);
    let mut names: Vec<&str> = fields.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "chat_template_kwargs",
            "chosen",
            "prompt",
            "rejected",
            "tools"
        ]
    );
    assert_eq!(fields["tools"], tools);
}

#[test]
fn hh_dialogues_become_messages() {
    let start =
        "\n\nHuman: What is 2+2?\n\nAssistant: Do you mean the sum?\n\nHuman: Yes.\n\nAssistant:";
    let row = one(
        json!({"chosen": format!("{start} It is 4."), "rejected": format!("{start} It is\n\n5.")}),
    );
    assert_eq!(row.shape, RowShape::Hh);
    let prompt = chat(&[
        ("user", "What is 2+2?"),
        ("assistant", "Do you mean the sum?"),
        ("user", "Yes."),
    ]);
    assert_eq!(
        texts(&row),
        [
            &prompt,
            &chat(&[("assistant", "It is 4.")]),
            &chat(&[("assistant", "It is\n\n5.")])
        ]
    );

    // If the human turns differ, the prompt ends before the last assistant turn that both dialogues
    // share.
    let start = "\n\nHuman: Hi\n\nAssistant: Hello";
    let row = one(json!({
        "chosen": format!("{start}\n\nHuman: A\n\nAssistant: a"),
        "rejected": format!("{start}\n\nHuman: B\n\nAssistant: b")
    }));
    assert_eq!(row.prompt, chat(&[("user", "Hi")]));
    assert_eq!(
        row.rejected,
        chat(&[("assistant", "Hello"), ("user", "B"), ("assistant", "b")])
    );

    // There are three line breaks before a marker; the first one belongs to the text.
    let row = one(
        json!({"chosen": "Human: Hi\n\n\nAssistant: a", "rejected": "Human: Hi\n\n\nAssistant: b"}),
    );
    assert_eq!(row.prompt, chat(&[("user", "Hi\n")]));

    let (_, reason, _) = refusal(
        json!({"chosen": "Human: Hi\n\nAssistant: a", "rejected": "Human: Ho\n\nAssistant: b"}),
    );
    assert_eq!(reason, IssueReason::DifferentPrompts);
    // If there is a prompt column, the answers are plain text.
    let row =
        one(json!({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}));
    assert_eq!(
        (row.shape, row.chosen),
        (RowShape::Preference, Text::Plain(" a".into()))
    );
    let many = "\n\nHuman: x".repeat(MAX_MESSAGES);
    let (field, reason, _) = refusal(json!({
        "chosen": format!("{many}\n\nAssistant: a"),
        "rejected": "Human: x\n\nAssistant: b"
    }));
    assert_eq!(
        (field.as_str(), reason),
        ("chosen", IssueReason::InvalidType)
    );
}

#[test]
fn several_rejected_answers_share_the_rows_weight() {
    let rows = all(&[
        json!({"id": "q", "prompt": "Q", "chosen": "a", "rejected": ["b", "c", "d", "e"],
            "weight": 2}),
        json!({"prompt": "P", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "P", "chosen": "a", "rejected": ["b"], "id": "single"}),
    ]);
    let rows: Vec<PreferenceRow> = rows.into_iter().map(Result::unwrap).collect();
    assert_eq!(
        rows.iter().map(|r| r.row).collect::<Vec<_>>(),
        [1, 1, 1, 1, 2, 3]
    );
    let ids: Vec<Option<&str>> = rows.iter().map(|r| r.id.as_deref()).collect();
    assert_eq!(
        ids,
        [
            Some("q#1"),
            Some("q#2"),
            Some("q#3"),
            Some("q#4"),
            None,
            Some("single")
        ]
    );
    for (row, answer) in rows.iter().zip(["b", "c", "d", "e"]) {
        assert_eq!((row.weight, row.shape), (0.5, RowShape::SeveralRejected));
        assert_eq!(
            texts(row),
            [
                &Text::Plain("Q".into()),
                &Text::Plain("a".into()),
                &Text::Plain(answer.into())
            ]
        );
    }
    assert_eq!(
        rows.iter().map(|r| r.pair).collect::<Vec<_>>(),
        [Some(1), Some(2), Some(3), Some(4), None, None]
    );
    assert_eq!(
        (rows[5].weight, rows[5].shape),
        (1.0, RowShape::SeveralRejected)
    );
}

#[test]
fn several_rejected_dialogues_and_answers_of_messages() {
    let answer = |text: &str| json!([{"role": "assistant", "content": text}]);
    let dialogue = |text: &str| {
        json!([
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": text}
        ])
    };
    let expected = [chat(&[("user", "Q")]), chat(&[("assistant", "a")])];
    for row in [
        json!({"prompt": [{"role": "user", "content": "Q"}], "chosen": answer("a"),
            "rejected": [answer("b"), answer("c")]}),
        json!({"chosen": dialogue("a"), "rejected": [dialogue("b"), dialogue("c")]}),
        json!({"prompt": "Q", "chosen": dialogue("a"), "rejected": [dialogue("b"), dialogue("c")]}),
        json!({"chosen": "Human: Q\n\nAssistant: a", "rejected": ["Human: Q\n\nAssistant: b",
            "Human: Q\n\nAssistant: c"]}),
    ] {
        let rows: Vec<PreferenceRow> = all(std::slice::from_ref(&row))
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(rows.len(), 2, "{row}");
        for (got, answer) in rows.iter().zip(["b", "c"]) {
            assert_eq!(
                texts(got),
                [&expected[0], &expected[1], &chat(&[("assistant", answer)])],
                "{row}"
            );
            assert_eq!((got.weight, got.shape), (0.5, RowShape::SeveralRejected));
        }
    }
}

#[test]
fn a_list_of_answers_that_cannot_be_used_is_named() {
    let row =
        |rejected: Value| json!({"id": "q", "prompt": "Q", "chosen": "a", "rejected": rejected});
    let (field, reason, message) =
        refusal(row(json!(["b", [{"role": "assistant", "content": "c"}]])));
    assert_eq!(
        (field.as_str(), reason),
        ("rejected", IssueReason::InvalidType)
    );
    assert!(message.contains("mixes"), "{message}");
    assert_eq!(
        refusal(row(json!(vec!["b"; MAX_ANSWERS + 1]))).1,
        IssueReason::InvalidType
    );
    let without_prompt = json!({"chosen": "Q a", "rejected": ["Q b", "Q c"]});
    assert_eq!(refusal(without_prompt).0, "prompt");

    let rows = all(&[row(
        json!([[{"role": "assistant", "content": "b"}], [{"role": "assistant"}]]),
    )]);
    let fields: Vec<&str> = rows
        .iter()
        .map(|r| r.as_ref().unwrap_err().field.as_str())
        .collect();
    assert_eq!(fields, ["rejected[0]", "rejected[1]"]);
    let mut weighed = row(json!(["b", "c"]));
    for weight in [json!(-1), json!(0), json!("heavy")] {
        weighed["weight"] = weight.clone();
        let rows = all(std::slice::from_ref(&weighed));
        let issue = rows[0].as_ref().unwrap_err();
        assert_eq!(issue.reason, IssueReason::InvalidWeight);
        assert!(
            issue.message.contains(&weight.to_string()),
            "{}",
            issue.message
        );
        assert_eq!(issue.id.as_deref(), Some("q#1"));
    }
}

#[test]
fn every_chosen_answer_makes_a_pair_with_every_rejected_one() {
    let rows = all(&[
        json!({"id": "t", "prompt": "Q", "chosen": ["a", "b"], "rejected": ["x", "y"],
            "weight": 2}),
        // RewardBench 2: the chosen answer is a list of one.
        json!({"prompt": "Q", "chosen": ["a"], "rejected": ["x", "y", "z"]}),
        json!({"prompt": "Q", "chosen": ["a", "b"], "rejected": "x"}),
        json!({"prompt": [{"role": "user", "content": "Q"}],
            "chosen": [[{"role": "assistant", "content": "a"}]],
            "rejected": [{"role": "assistant", "content": "x"}]}),
    ]);
    let rows: Vec<PreferenceRow> = rows.into_iter().map(Result::unwrap).collect();
    let plain = |text: &Text| match text {
        Text::Plain(text) => text.clone(),
        Text::Chat(messages) => messages[0].fields()["content"].as_str().unwrap().to_owned(),
    };
    let pairs: Vec<(u64, String, Option<u32>)> = rows
        .iter()
        .map(|r| (r.row, plain(&r.chosen) + &plain(&r.rejected), r.pair))
        .collect();
    let expected = [
        (1, "ax", Some(1)),
        (1, "ay", Some(2)),
        (1, "bx", Some(3)),
        (1, "by", Some(4)),
        (2, "ax", Some(1)),
        (2, "ay", Some(2)),
        (2, "az", Some(3)),
        (3, "ax", Some(1)),
        (3, "bx", Some(2)),
        (4, "ax", None),
    ];
    assert_eq!(
        pairs,
        expected.map(|(row, pair, place)| (row, pair.to_owned(), place))
    );
    assert_eq!((rows[3].weight, rows[3].id.as_deref()), (0.5, Some("t#4")));
    let shapes: Vec<RowShape> = rows.iter().map(|r| r.shape).collect();
    assert_eq!(shapes[0], RowShape::SeveralAnswers);
    assert_eq!(shapes[4], RowShape::SeveralRejected);
    assert_eq!(
        (shapes[7], shapes[9]),
        (RowShape::SeveralAnswers, RowShape::SeveralRejected)
    );
    // Only pairs of one chosen answer have the index of their rejected answer.
    assert_eq!(rows[5].column("rejected"), "rejected[1]");
    assert_eq!(rows[1].column("rejected"), "rejected");

    let (field, reason, message) =
        refusal(json!({"prompt": "Q", "chosen": ["a", [], "b"], "rejected": "x"}));
    assert_eq!(
        (field.as_str(), reason),
        ("chosen", IssueReason::InvalidType)
    );
    assert!(message.contains("mixes"), "{message}");
    let (field, _, message) =
        refusal(json!({"prompt": "Q", "chosen": vec!["a"; 40], "rejected": vec!["x"; 40]}));
    assert!(
        field == "rejected" && message.contains("1600 pairs"),
        "{message}"
    );
    let (field, reason, _) = refusal(json!({"prompt": "Q", "chosen": ["a"]}));
    assert_eq!(
        (field.as_str(), reason),
        ("rejected", IssueReason::MissingField)
    );
}
