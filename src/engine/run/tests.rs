//! What names a run's reference.

use std::path::PathBuf;

use super::*;
use crate::domain::dpo::ReferenceSync;
use crate::domain::training::TrainingSpec;
use crate::engine::scoring::tests::{base, bases};

fn run() -> TrainingRun {
    let mut spec = TrainingSpec { method: Method::Full, ..Default::default() };
    spec.dpo.reference_sync = Some(ReferenceSync { alpha: 0.5, every_steps: 1 });
    TrainingRun {
        job: "job".into(),
        model: "tiny".into(),
        start: base(),
        reference: Some(base()),
        spec,
        train: Vec::new(),
        eval: Vec::new(),
        checkpoints: PathBuf::new(),
        resume: None,
        events: tokio::sync::mpsc::channel(1).0,
        control: Default::default(),
    }
}

#[test]
fn a_moving_reference_starts_from_unrounded_weights_on_every_server() {
    let identity = |stored: Precision| {
        let bases = bases(stored);
        let exact = ExactWeights { bases: &bases, read: read_exact(&models_to_read(&run(), &bases), &bases, &Default::default()).unwrap() };
        assert_eq!(exact.read.len(), usize::from(stored == Precision::Bf16), "read where the ones in memory are rounded");
        let moving = reference(&run(), &exact, &mut Residents::new(1), Precision::F32, &Arc::default());
        moving.unwrap().weights().unwrap().1.to_owned()
    };
    assert_eq!(identity(Precision::F32), identity(Precision::Bf16));
    assert!(identity(Precision::F32).contains(Precision::F32.name()));
}
