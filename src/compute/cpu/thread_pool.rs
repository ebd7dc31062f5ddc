//! Parallel loops over a fixed pool of threads.
//!
//! A forward pass runs thousands of loops that take a fraction of a millisecond each. With a
//! general-purpose pool, waking threads between loops cost a tenth of the time. The threads of this
//! pool therefore spin for a moment before they sleep.
//!
//! One loop runs at a time. A loop inside a task, or one that starts while another caller's loop
//! runs, is executed by its caller alone. A task is a pure function of its index, so results do not
//! depend on which thread ran it.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Time that a thread spins while it waits for the next loop before it sleeps.
const MAX_SPIN_TIME: Duration = Duration::from_micros(300);
/// Flag in `ThreadPool::state`: the loop accepts no more helpers. The bits below it count the
/// helpers that entered; the bits above it are the loop's number.
const CLOSED: u64 = 1 << 16;
const NEXT_LOOP: u64 = 1 << 17;

static THREADS: AtomicUsize = AtomicUsize::new(0);
static POOL: OnceLock<ThreadPool> = OnceLock::new();

thread_local! {
    static INSIDE_LOOP: Cell<bool> = const { Cell::new(false) };
}

/// Sets the number of threads; 0, the default, means all cores. Has no effect once the pool has
/// started.
pub fn set_threads(threads: usize) {
    THREADS.store(threads, Ordering::Relaxed);
}

/// Returns the number of threads that share a loop, the caller included.
pub fn threads() -> usize {
    pool().helpers + 1
}

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// The loop that is running.
struct Loop {
    task: Option<Task<'static>>,
    tasks: usize,
}

struct ThreadPool {
    helpers: usize,
    /// Locked by the caller of the running loop.
    caller: Mutex<()>,
    state: AtomicU64,
    /// Written by the caller before it opens the loop; read by helpers after they have entered.
    current: std::cell::UnsafeCell<Loop>,
    next: AtomicUsize,
    helpers_done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleeping: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `current` changes only while no helper is inside a loop, which `state` and `helpers_done`
// guarantee.
unsafe impl Sync for ThreadPool {}
// SAFETY: the task pointer is only used while its loop runs.
unsafe impl Send for ThreadPool {}

fn pool() -> &'static ThreadPool {
    POOL.get_or_init(|| {
        let wanted = THREADS.load(Ordering::Relaxed);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut helpers = if wanted > 0 { wanted } else { cores } - 1;
        let mut started = 0;
        for i in 0..helpers {
            if std::thread::Builder::new()
                .name(format!("compute-{i}"))
                .spawn(helper_main)
                .is_ok()
            {
                started += 1;
            }
        }
        helpers = started;
        ThreadPool {
            helpers,
            caller: Mutex::new(()),
            state: AtomicU64::new(CLOSED),
            current: std::cell::UnsafeCell::new(Loop {
                task: None,
                tasks: 0,
            }),
            next: AtomicUsize::new(0),
            helpers_done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleeping: Mutex::new(0),
            wake: Condvar::new(),
        }
    })
}

/// Main function of a helper thread.
fn helper_main() {
    INSIDE_LOOP.set(true);
    let pool = loop {
        match POOL.get() {
            Some(pool) => break pool,
            None => std::thread::yield_now(),
        }
    };
    let mut seen = 0;
    loop {
        let state = pool.wait_for_loop(seen);
        seen = state / NEXT_LOOP;
        if pool
            .state
            .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
        {
            pool.run_tasks();
            pool.helpers_done.fetch_add(1, Ordering::Release);
        } else {
            // Another helper entered at the same time, or the loop was closed: try again.
            seen = seen.saturating_sub(1);
        }
    }
}

impl ThreadPool {
    /// Waits for an open loop with a number above `seen` and returns the state.
    fn wait_for_loop(&self, seen: u64) -> u64 {
        let open = |state: u64| state & CLOSED == 0 && state / NEXT_LOOP > seen;
        loop {
            let start = Instant::now();
            loop {
                for _ in 0..64 {
                    let state = self.state.load(Ordering::Acquire);
                    if open(state) {
                        return state;
                    }
                    std::hint::spin_loop();
                }
                if start.elapsed() > MAX_SPIN_TIME {
                    break;
                }
            }
            let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
            // The caller opens the loop before it takes this lock. Either it sees this thread
            // asleep, or this thread sees the loop.
            if !open(self.state.load(Ordering::SeqCst)) {
                *sleeping += 1;
                sleeping = self
                    .wake
                    .wait(sleeping)
                    .unwrap_or_else(PoisonError::into_inner);
                *sleeping -= 1;
            }
        }
    }

    /// Takes tasks of the running loop, one after the other, until none is left.
    fn run_tasks(&self) {
        // SAFETY: this thread has entered, and the caller waits for all who entered before it
        // changes the loop.
        let Loop {
            task: Some(task),
            tasks,
        } = (unsafe { &*self.current.get() })
        else {
            return;
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= *tasks {
                    return;
                }
                task(i);
            }
        }));
        if let Err(panic) = outcome {
            // Tasks that have not started are skipped.
            self.next.store(usize::MAX / 2, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    /// Runs a loop and returns the payload of a task's panic, if there was one. Returns `None`
    /// without running anything if another loop is running.
    fn run(&self, tasks: usize, task: Task) -> Option<Option<Box<dyn Any + Send>>> {
        let Ok(_turn) = self.caller.try_lock() else {
            return None;
        };
        // SAFETY: the reference is removed from `current` before this function returns, and by then
        // no helper is inside the loop.
        let task: Task<'static> = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: the previous loop is closed and all its helpers have left.
        unsafe {
            *self.current.get() = Loop {
                task: Some(task),
                tasks,
            }
        };
        self.next.store(0, Ordering::Relaxed);
        self.helpers_done.store(0, Ordering::Relaxed);
        let number = self.state.load(Ordering::Relaxed) / NEXT_LOOP + 1;
        self.state.store(number * NEXT_LOOP, Ordering::SeqCst);
        if *self.sleeping.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            self.wake.notify_all();
        }
        INSIDE_LOOP.set(true);
        self.run_tasks();
        INSIDE_LOOP.set(false);
        let entered = (self.state.fetch_or(CLOSED, Ordering::AcqRel) & (CLOSED - 1)) as usize;
        let mut spins = 0u32;
        while self.helpers_done.load(Ordering::Acquire) < entered {
            spins += 1;
            if spins < 10_000 {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
        }
        // SAFETY: all helpers have left the loop.
        unsafe { (*self.current.get()).task = None };
        Some(
            self.panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        )
    }
}

/// Runs `f(i)` for every i below `tasks`, on all threads, and returns when all are done. A panic in
/// a task is resumed in the caller.
pub fn for_each(tasks: usize, f: impl Fn(usize) + Sync) {
    let pool = pool();
    if tasks > 1
        && pool.helpers > 0
        && !INSIDE_LOOP.get()
        && let Some(panic) = pool.run(tasks, &f)
    {
        // `run` has released its lock, so that this panic does not poison the pool.
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        return;
    }
    (0..tasks).for_each(f);
}

/// Runs `f(i)` for every i below `tasks` on all threads and returns the results in order.
pub fn map<R: Send>(tasks: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let mut out: Vec<Option<R>> = (0..tasks).map(|_| None).collect();
    chunks(&mut out, 1, |i, slot| slot[0] = Some(f(i)));
    out.into_iter().flatten().collect()
}

/// Pointer that tasks share because each of them uses a part of its own.
struct DisjointParts<T>(*mut T);
// SAFETY: tasks create disjoint slices from it.
unsafe impl<T: Send> Sync for DisjointParts<T> {}

impl<T> DisjointParts<T> {
    /// Returns chunk `i` of a slice of `len` elements that is divided into chunks of `chunk`
    /// elements.
    ///
    /// # Safety
    /// The slice outlives the chunk, and no other reference to chunk `i` exists.
    #[allow(clippy::mut_from_ref)]
    unsafe fn chunk(&self, len: usize, chunk: usize, i: usize) -> &mut [T] {
        let start = i * chunk;
        // SAFETY: the chunk is inside the slice; the caller guarantees exclusive access.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), chunk.min(len - start)) }
    }
}

/// Runs `f(i, chunk)` on all threads for the chunks of `chunk` elements of `data`; the last one may
/// be shorter.
pub fn chunks<T: Send>(data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let len = data.len();
    let parts = DisjointParts(data.as_mut_ptr());
    for_each(len.div_ceil(chunk.max(1)), |i| {
        // SAFETY: every index is passed to one task only.
        f(i, unsafe { parts.chunk(len, chunk, i) })
    });
}

/// Runs `f(i, a, b, c)` on all threads for the chunks of three slices of the same length.
pub fn chunks3<T: Send>(
    a: &mut [T],
    b: &mut [T],
    c: &mut [T],
    chunk: usize,
    f: impl Fn(usize, &mut [T], &mut [T], &mut [T]) + Sync,
) {
    let len = a.len().min(b.len()).min(c.len());
    let (a, b, c) = (
        DisjointParts(a.as_mut_ptr()),
        DisjointParts(b.as_mut_ptr()),
        DisjointParts(c.as_mut_ptr()),
    );
    // SAFETY: every index is passed to one task only.
    for_each(len.div_ceil(chunk.max(1)), |i| unsafe {
        f(
            i,
            a.chunk(len, chunk, i),
            b.chunk(len, chunk, i),
            c.chunk(len, chunk, i),
        )
    });
}

/// Returns the number of rows per task, at least four, so that every thread gets about four tasks
/// of a loop over `rows` rows.
pub fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(4 * threads()).max(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_also_from_several_callers_and_nested() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in [0, 1, 2, 100, 1000] {
                        let counts: Vec<AtomicUsize> =
                            (0..n).map(|_| AtomicUsize::new(0)).collect();
                        for_each(n, |i| {
                            for_each(3, |_| {
                                counts[i].fetch_add(1, Ordering::Relaxed);
                            })
                        });
                        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 3));
                    }
                });
            }
        });
        assert_eq!(map(5, |i| i * i), [0, 1, 4, 9, 16]);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
        let result = catch_unwind(|| for_each(100, |i| assert!(i != 50, "task {i}")));
        assert!(result.is_err());
        let mut data = vec![0usize; 10];
        chunks(&mut data, 3, |i, c| c.fill(i));
        assert_eq!(data, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
        assert!(
            !pool().caller.is_poisoned(),
            "the lock is poisoned, so that no loop runs in parallel"
        );
    }

    #[test]
    fn helpers_that_slept_wake_up() {
        for_each(2, |_| {});
        std::thread::sleep(Duration::from_millis(20));
        let sum = AtomicUsize::new(0);
        for_each(64, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 2016);
    }
}
