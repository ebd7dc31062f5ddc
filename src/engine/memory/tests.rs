//! Tests of the memory that runs leave free, and of the limits of control groups.

use super::*;

#[test]
fn loaded_weights_have_the_room_that_runs_leave() {
    let (run, host) = (Arc::new(AtomicU64::new(0)), HostMemory::new(600));
    let room = Room::new(100, run.clone(), host.clone(), 4);
    assert_eq!(room.bytes(), 100);
    room.reserve_for_run(30);
    // The run needs the same amount of every device in its group.
    assert_eq!(
        Room::new(100, run, HostMemory::new(u64::MAX), 1).bytes(),
        70
    );
    host.set_in_use(400);
    assert_eq!(
        (host.left(), room.bytes()),
        (200, 50),
        "a quarter of the machine's memory"
    );
    assert!(host.allows(600) && !host.allows(601));
}

fn write(root: &Path, file: &str, text: &str) {
    let file = root.join(file);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, text).unwrap();
}

#[test]
fn the_lowest_limit_on_the_way_to_the_root_counts() {
    let mount = tempfile::tempdir().unwrap();
    let of = |groups: &str| group_limit(mount.path(), groups);
    assert_eq!(of("0::/a/b\n"), None, "no file, no limit");
    write(mount.path(), "a/b/memory.max", "max\n");
    assert_eq!(of("0::/a/b\n"), None);
    write(mount.path(), "a/memory.max", "4096\n");
    assert_eq!(of("0::/a/b\n"), Some(4096));
    write(mount.path(), "a/b/memory.max", "8192\n");
    assert_eq!(of("0::/a/b\n"), Some(4096), "the group above is tighter");
    write(mount.path(), "a/b/memory.max", "1024\n");
    assert_eq!(of("0::/a/b\n"), Some(1024));
    // In a container the group's own limit is at the root, whatever the listed path says.
    write(mount.path(), "memory.max", "512\n");
    assert_eq!(of("0::/not/mounted/here\n"), Some(512));
}

#[test]
fn groups_of_version_1_have_their_limits_below_the_memory_controller() {
    let mount = tempfile::tempdir().unwrap();
    write(
        mount.path(),
        "memory/docker/x/memory.limit_in_bytes",
        "2048\n",
    );
    write(
        mount.path(),
        "memory/memory.limit_in_bytes",
        "9223372036854771712\n",
    );
    write(mount.path(), "cpu/docker/x/memory.limit_in_bytes", "1\n");
    let groups = "12:cpu,cpuacct:/docker/x\n11:memory:/docker/x\n0::/docker/x\n";
    assert_eq!(group_limit(mount.path(), groups), Some(2048));
}

#[test]
fn a_group_of_version_1_without_a_limit_has_none() {
    let mount = tempfile::tempdir().unwrap();
    write(
        mount.path(),
        "memory/memory.limit_in_bytes",
        "9223372036854771712\n",
    );
    assert_eq!(group_limit(mount.path(), "4:memory:/\n"), None);
}

#[test]
fn a_limit_is_at_most_the_memory_that_there_is() {
    assert_eq!(within(None, Some(1000)), 900);
    assert_eq!(within(Some(400), Some(1000)), 400);
    assert_eq!(within(Some(4000), Some(1000)), 1000);
    assert_eq!(within(Some(4000), None), 4000);
    assert_eq!(within(None, None), u64::MAX);
}

#[test]
fn the_machines_memory_is_read_in_bytes() {
    assert_eq!(
        memory_total("MemTotal:       16384 kB\nMemFree:  1 kB\n"),
        Some(16384 * 1024)
    );
}
