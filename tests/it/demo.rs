//! `bradley demo` with a tiny model: trains, scores, and shows a question answered before and
//! after.

use crate::people::bradley;
use crate::server::free_port;
use crate::support::golden;

#[test]
fn the_demo_answers_a_question_before_and_after_the_training() {
    let model = golden("models/llama");
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let args = ["demo", "--device", "cpu", "--epochs", "0.05", "--model"];
    let out = bradley(&nowhere, &args).arg(model).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let shown = String::from_utf8(out.stdout).unwrap();
    let parts: Vec<usize> = [
        "4. Training a LoRA adapter with DPO",
        "│ before training",
        "│ after training",
        "   question:\n     What causes the phases of the Moon?\n",
        "   before training:\n",
        "   after training:\n",
        " seconds in all",
    ]
    .map(|part| {
        shown
            .find(part)
            .unwrap_or_else(|| panic!("{part} is not in\n{shown}"))
    })
    .into();
    assert!(parts.is_sorted(), "{shown}");
    assert!(!shown.contains("cannot generate"), "{shown}");
}
