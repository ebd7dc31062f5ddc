//! Tests of the policy cache's limits, of requests that wait for its memory, and of the description
//! of a base model.

use std::path::PathBuf;

use super::*;
use crate::engine::memory::HostMemory;
use crate::engine::scoring::tests::base_models;
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(folder)
}

/// Returns the base model's own files as the full weights of checkpoint `i`.
fn full(i: usize) -> WeightsRef {
    WeightsRef::Full {
        model: "tiny".into(),
        dir: golden("models/llama"),
        content: i.to_string(),
    }
}

fn adapter() -> WeightsRef {
    WeightsRef::Adapter {
        model: "tiny".into(),
        dir: golden("adapters/llama"),
        content: "adapter".into(),
    }
}

/// Returns a cache with a limit of `bytes`. Its limit of 8 entries is never reached.
fn policies(bytes: u64) -> PolicyCache {
    let mut policies = PolicyCache::new(8);
    policies.limit_bytes(Room::new(
        bytes,
        Arc::default(),
        HostMemory::new(u64::MAX),
        1,
    ));
    policies
}

fn contents(policies: &PolicyCache) -> Vec<&str> {
    let all = policies.all.iter().map(|r| match &r.weights {
        WeightsRef::Full { content, .. } | WeightsRef::Adapter { content, .. } => content.as_str(),
        other => panic!("{other:?}"),
    });
    all.collect()
}

fn full_size(base_models: &BaseModels) -> u64 {
    let bytes = base_models.full_bytes(&full(0)).unwrap().unwrap();
    assert_eq!(bytes, 4 * base_models.infos()[0].parameters);
    bytes
}

#[test]
fn the_least_recently_used_weights_leave_when_there_is_no_room_for_more() {
    let base_models = base_models(Precision::F32);
    let bytes = full_size(&base_models);
    // There is room for two.
    let mut policies = policies(2 * bytes + bytes / 2);
    for i in [0, 1, 0, 2] {
        policies.get(&base_models, &full(i)).unwrap();
    }
    assert_eq!(contents(&policies), ["0", "2"], "1 was used before 0");
    // Each further checkpoint takes the place of the one that was not used for the longest time.
    for i in 3..9 {
        policies.get(&base_models, &full(i)).unwrap();
    }
    assert_eq!(contents(&policies), ["7", "8"]);
}

#[test]
fn weights_in_use_stay_and_what_has_no_room_beside_them_is_refused() {
    let base_models = base_models(Precision::F32);
    let mut policies = policies(2 * full_size(&base_models));
    let held = policies.get(&base_models, &full(0)).unwrap();
    let also_held = policies.get(&base_models, &full(1)).unwrap();
    let refused = policies.get(&base_models, &full(2)).unwrap_err();
    assert!(
        matches!(
            refused,
            EngineError::NoRoom {
                needed_mib: 1,
                available_mib: 0,
                setting: "memory_limit"
            }
        ),
        "{refused:?}"
    );
    assert!(
        refused.to_string().contains("raise memory_limit"),
        "{refused}"
    );
    assert_eq!(contents(&policies), ["0", "1"]);
    drop(also_held);
    policies.get(&base_models, &full(2)).unwrap();
    assert_eq!(contents(&policies), ["0", "2"]);
    policies.evict_unused();
    assert_eq!(contents(&policies), ["0"]);
    drop(held);
    policies.evict_unused();
    assert!(contents(&policies).is_empty());
}

#[test]
fn what_is_larger_than_all_the_room_is_refused_and_a_run_has_the_room_that_it_was_granted() {
    let base_models = base_models(Precision::F32);
    let mut policies = policies(full_size(&base_models) - 1);
    assert!(matches!(
        policies.get(&base_models, &full(0)),
        Err(EngineError::NoRoom { .. })
    ));
    assert!(policies.get_for_run(&base_models, &full(0)).is_ok());
}

#[test]
fn a_run_takes_the_room_of_weights_that_nothing_uses_and_gives_it_back() {
    let base_models = base_models(Precision::F32);
    let bytes = full_size(&base_models);
    let mut policies = policies(3 * bytes);
    for i in 0..3 {
        policies.get(&base_models, &full(i)).unwrap();
    }
    policies.reserve_for_run(2 * bytes);
    assert_eq!(contents(&policies), ["2"]);
    // The run's own reference is part of the run's needs.
    let reference = policies.get_for_run(&base_models, &full(5)).unwrap();
    policies.get(&base_models, &full(6)).unwrap();
    assert_eq!(contents(&policies), ["5", "6"]);
    drop(reference);
    policies.reserve_for_run(0);
    policies.get(&base_models, &full(7)).unwrap();
    assert_eq!(contents(&policies), ["5", "6", "7"]);
    policies.get(&base_models, &full(8)).unwrap();
    assert_eq!(
        contents(&policies),
        ["6", "7", "8"],
        "it counts like any other when the run is over"
    );
}

#[test]
fn adapters_are_counted_as_they_are_in_memory() {
    let base_models = base_models(Precision::F32);
    let policy = base_models.open(&adapter()).unwrap();
    let elements: usize = policy
        .adapter
        .as_ref()
        .unwrap()
        .named()
        .iter()
        .map(|(_, t)| t.elem_count())
        .sum();
    let bytes = 4 * elements as u64;
    assert_eq!(adapter_bytes(&policy), bytes);
    assert!(bytes > 0 && bytes < full_size(&base_models));
    assert!(policies(bytes).get(&base_models, &adapter()).is_ok());
    assert!(
        policies(bytes - 1).get(&base_models, &adapter()).is_ok(),
        "an adapter is refused for lack of room"
    );
    // An adapter is evicted for full weights only if both do not fit.
    for (lacking, expected) in [(0, &["adapter", "0"][..]), (1, &["0"][..])] {
        let mut policies = policies(full_size(&base_models) + bytes - lacking);
        policies.get(&base_models, &adapter()).unwrap();
        policies.get(&base_models, &full(0)).unwrap();
        assert_eq!(contents(&policies), expected);
    }
}

#[test]
fn the_number_of_cached_weights_stays_limited() {
    let base_models = base_models(Precision::F32);
    let mut policies = PolicyCache::new(2);
    for i in 0..4 {
        policies.get(&base_models, &full(i)).unwrap();
    }
    assert_eq!(contents(&policies), ["2", "3"]);
}

#[test]
fn a_model_of_text_and_images_is_described_as_text_only() {
    let describe_golden = |folder: &str| {
        let folder = golden(folder);
        let path = folder.to_str().unwrap();
        let model = load_model(Some("tiny"), path, &HubOptions::default()).unwrap();
        describe(&model, "cpu")
    };
    let (alone, part) = (
        describe_golden("models/gemma3"),
        describe_golden("models/qwen2_vl"),
    );
    assert_eq!(
        (alone.architecture.as_str(), alone.text_only),
        ("gemma3_text", false)
    );
    assert_eq!(
        (part.architecture.as_str(), part.text_only),
        ("qwen2_vl", true)
    );
    assert_eq!((alone.stored_format, part.stored_format), ("f32", "f32"));
}

#[test]
fn a_request_waits_for_what_other_requests_hold_but_not_for_a_run() {
    let base_models = base_models(Precision::F32);
    let full_bytes = full_size(&base_models);
    let mut policies = policies(full_bytes + 1000);
    let held = policies.get(&base_models, &full(0)).unwrap();
    policies.reserve_cache(&base_models, 600).unwrap();
    let mut must_wait = |weights: &WeightsRef, bytes: u64, run: u64| {
        policies.reserve_for_run(run);
        policies.must_wait(&base_models, weights, bytes)
    };
    // With the same weights.
    assert!(!must_wait(&full(0), 400, 0) && must_wait(&full(0), 401, 0));
    assert!(must_wait(&full(0), 1000, 0) && !must_wait(&full(0), 1001, 0));
    assert!(must_wait(&full(0), 400, 1) && !must_wait(&full(0), 1000, 1));
    // Other weights have room when those in use have left.
    assert!(must_wait(&full(1), 1000, 0) && !must_wait(&full(1), 1001, 0));
    let refused = policies.reserve_cache(&base_models, 1 << 20);
    assert!(matches!(
        refused,
        Err(EngineError::NoRoomToGenerate {
            needed_mib: 1,
            available_mib: 0,
            setting: "memory_limit"
        })
    ));
    drop(held);
}
