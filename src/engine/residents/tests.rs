//! Tests of the byte limit of the weight cache.

use std::path::PathBuf;

use super::*;
use crate::engine::memory::HostMemory;
use crate::engine::scoring::tests::bases;

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(folder)
}

/// Returns the base model's own files as the full weights of checkpoint `i`.
fn full(i: usize) -> WeightsRef {
    WeightsRef::Full { model: "tiny".into(), dir: golden("models/llama"), content: i.to_string() }
}

fn adapter() -> WeightsRef {
    WeightsRef::Adapter {
        model: "tiny".into(),
        dir: golden("adapters/llama"),
        content: "adapter".into(),
    }
}

/// Returns a cache with a limit of `bytes`. Its limit of 8 entries is never reached.
fn residents(bytes: u64) -> Residents {
    let mut residents = Residents::new(8);
    residents.limit_bytes(Room::new(bytes, Arc::default(), HostMemory::new(u64::MAX), 1));
    residents
}

fn contents(residents: &Residents) -> Vec<&str> {
    let all = residents.all.iter().map(|r| match &r.weights {
        WeightsRef::Full { content, .. } | WeightsRef::Adapter { content, .. } => content.as_str(),
        other => panic!("{other:?}"),
    });
    all.collect()
}

fn full_size(bases: &Bases) -> u64 {
    let bytes = bases.full_bytes(&full(0)).unwrap().unwrap();
    assert_eq!(bytes, 4 * bases.infos()[0].parameters);
    bytes
}

#[test]
fn the_least_recently_used_weights_leave_when_there_is_no_room_for_more() {
    let bases = bases(Precision::F32);
    let bytes = full_size(&bases);
    // There is room for two.
    let mut residents = residents(2 * bytes + bytes / 2);
    for i in [0, 1, 0, 2] {
        residents.get(&bases, &full(i)).unwrap();
    }
    assert_eq!(contents(&residents), ["0", "2"], "1 was used before 0");
    // A sixth checkpoint is scored like the first.
    for i in 3..9 {
        residents.get(&bases, &full(i)).unwrap();
    }
    assert_eq!(contents(&residents), ["7", "8"]);
}

#[test]
fn weights_in_use_stay_and_what_has_no_room_beside_them_is_refused() {
    let bases = bases(Precision::F32);
    let mut residents = residents(2 * full_size(&bases));
    let held = residents.get(&bases, &full(0)).unwrap();
    let also_held = residents.get(&bases, &full(1)).unwrap();
    let refused = residents.get(&bases, &full(2)).unwrap_err();
    assert!(
        matches!(
            refused,
            EngineError::NoRoom { needed_mib: 1, available_mib: 0, setting: "memory_limit" }
        ),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("raise memory_limit"), "{refused}");
    assert_eq!(contents(&residents), ["0", "1"]);
    drop(also_held);
    residents.get(&bases, &full(2)).unwrap();
    assert_eq!(contents(&residents), ["0", "2"]);
    residents.evict_unused();
    assert_eq!(contents(&residents), ["0"]);
    drop(held);
    residents.evict_unused();
    assert!(contents(&residents).is_empty());
}

#[test]
fn what_is_larger_than_all_the_room_is_refused_and_a_run_has_the_room_that_it_was_granted() {
    let bases = bases(Precision::F32);
    let mut residents = residents(full_size(&bases) - 1);
    assert!(matches!(residents.get(&bases, &full(0)), Err(EngineError::NoRoom { .. })));
    assert!(residents.get_for_run(&bases, &full(0)).is_ok());
}

#[test]
fn a_run_takes_the_room_of_weights_that_nothing_uses_and_gives_it_back() {
    let bases = bases(Precision::F32);
    let bytes = full_size(&bases);
    let mut residents = residents(3 * bytes);
    for i in 0..3 {
        residents.get(&bases, &full(i)).unwrap();
    }
    residents.reserve_for_run(2 * bytes);
    assert_eq!(contents(&residents), ["2"]);
    // The run's own reference is part of the run's needs.
    let reference = residents.get_for_run(&bases, &full(5)).unwrap();
    residents.get(&bases, &full(6)).unwrap();
    assert_eq!(contents(&residents), ["5", "6"]);
    drop(reference);
    residents.reserve_for_run(0);
    residents.get(&bases, &full(7)).unwrap();
    assert_eq!(contents(&residents), ["5", "6", "7"]);
    residents.get(&bases, &full(8)).unwrap();
    assert_eq!(
        contents(&residents),
        ["6", "7", "8"],
        "it counts like any other when the run is over"
    );
}

#[test]
fn adapters_are_counted_as_they_are_in_memory() {
    let bases = bases(Precision::F32);
    let policy = bases.open(&adapter()).unwrap();
    let elements: usize =
        policy.adapter.as_ref().unwrap().named().iter().map(|(_, t)| t.elem_count()).sum();
    let bytes = 4 * elements as u64;
    assert!(bytes > 0 && bytes < full_size(&bases));
    assert!(residents(bytes).get(&bases, &adapter()).is_ok());
    assert!(residents(bytes - 1).get(&bases, &adapter()).is_ok(), "an adapter is never refused");
    // An adapter is evicted for full weights that need its memory.
    let mut residents = residents(full_size(&bases));
    residents.get(&bases, &adapter()).unwrap();
    residents.get(&bases, &full(0)).unwrap();
    assert_eq!(contents(&residents), ["0"]);
}

#[test]
fn their_number_stays_limited() {
    let bases = bases(Precision::F32);
    let mut residents = Residents::new(2);
    for i in 0..4 {
        residents.get(&bases, &full(i)).unwrap();
    }
    assert_eq!(contents(&residents), ["2", "3"]);
}
