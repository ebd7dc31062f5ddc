//! Tests of the identity of a run's reference, and of the memory in which a run starts.

use std::path::PathBuf;

use super::*;
use crate::domain::dpo::ReferenceSync;
use crate::domain::training::TrainingSpec;
use crate::engine::scoring::tests::{base, base_models, pair};
use crate::train::estimate::{Lengths, MemoryKind, plan};

fn run() -> TrainingRun {
    let mut spec = TrainingSpec {
        method: Method::Full,
        ..Default::default()
    };
    spec.dpo.reference_sync = Some(ReferenceSync {
        alpha: 0.5,
        every_steps: 1,
    });
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
        let base_models = base_models(stored);
        let exact = ExactWeights {
            base_models: &base_models,
            read: read_exact(
                &models_to_read(&run(), &base_models),
                &base_models,
                &Default::default(),
            )
            .unwrap(),
        };
        assert_eq!(
            exact.read.len(),
            usize::from(stored == Precision::Bf16),
            "files are read exactly if the weights in memory are rounded"
        );
        let moving = reference(
            &run(),
            &exact,
            &mut PolicyCache::new(1),
            Precision::F32,
            &Arc::default(),
        );
        moving.unwrap().weights().unwrap().1.to_owned()
    };
    assert_eq!(identity(Precision::F32), identity(Precision::Bf16));
    assert!(identity(Precision::F32).contains(Precision::F32.name()));
}

#[test]
fn a_run_starts_with_its_leanest_plan_and_with_none_below() {
    let base_models = base_models(Precision::F32);
    let longer = vec![pair(80); 3];
    let start = |memory| {
        let mut run = TrainingRun {
            train: vec![pair(40); 3],
            eval: longer.clone(),
            ..run()
        };
        prepare(
            &mut run,
            &base_models,
            ExactBases::new(),
            &mut PolicyCache::new(1),
            memory,
            &Arc::default(),
        )
    };
    let (config, spec) = (&base_models.get("tiny").unwrap().policy.config, run().spec);
    let lengths = Lengths::of(&longer, spec.batch.batch_size);
    let leanest = plan(config, &spec, lengths, 0, MemoryKind::Host)
        .unwrap_err()
        .total();
    assert_eq!(start(leanest).unwrap().planned_bytes(), leanest);
    let Err(EngineError::OutOfMemory {
        needed_mib,
        available_mib,
        remedy,
    }) = start(leanest - 1).map(|_| ())
    else {
        panic!("the run is not refused for lack of memory");
    };
    assert!(
        needed_mib > available_mib
            && available_mib == (leanest - 1) >> 20
            && remedy.contains("lower max_length"),
        "{remedy}"
    );
}

#[test]
fn weights_of_a_runs_reference_are_cached_where_others_find_them() {
    let base_models = base_models(Precision::F32);
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
    let checkpoint = WeightsRef::Full {
        model: "tiny".into(),
        dir,
        content: "hash".into(),
    };
    let mut frozen = TrainingRun {
        reference: Some(checkpoint),
        ..run()
    };
    frozen.spec.dpo.reference_sync = None;
    frozen.spec.precision = Some(Precision::Bf16);
    let exact = ExactWeights {
        base_models: &base_models,
        read: ExactBases::new(),
    };
    let mut policies = PolicyCache::new(1);
    let reference = reference(
        &frozen,
        &exact,
        &mut policies,
        Precision::Bf16,
        &Arc::default(),
    )
    .unwrap();
    policies.evict_unused();
    assert!(
        !policies.is_empty(),
        "the reference is evicted although the run uses it"
    );
    drop(reference);
    policies.evict_unused();
    assert!(policies.is_empty());
}
