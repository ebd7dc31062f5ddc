//! Tests of a worker's generator on a tiny model: blocks are freed however requests end, callers
//! that do not read are waited for, and requests wait for room.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::Path;

use metrics_exporter_prometheus::PrometheusBuilder;
use proptest::prelude::*;

use super::*;
use crate::domain::training::{LoraConfig, Precision};
use crate::engine::memory::{HostMemory, Room};
use crate::engine::scoring::tests::{base, base_models};
use crate::infer::generate::{LogProbOptions, SamplingOptions};
use crate::infer::pair::SequenceGroup;
use crate::infer::scorer::score;

type GenerationEvents = mpsc::Receiver<GenerationResult>;

fn request(prompt: usize, samples: usize, max_tokens: usize) -> GenerationRequest {
    GenerationRequest {
        prompt: (0..prompt as u32).map(|i| 5 + i % 300).collect(),
        samples,
        max_tokens,
        sampling: SamplingOptions {
            temperature: 1.0,
            top_p: None,
            top_k: None,
            seed: 1,
        },
        stop_tokens: Vec::new(),
        log_probs: LogProbOptions::default(),
    }
}

fn entry(request: GenerationRequest) -> (GenerationEntry, GenerationEvents) {
    let (events, receiver) = mpsc::channel(channel_capacity(request.samples));
    let stopped = (0..request.samples).map(|_| AtomicBool::new(false));
    let entry = GenerationEntry {
        stopped: stopped.collect(),
        request,
        policy: base(),
        enqueued: Instant::now(),
        events,
    };
    (entry, receiver)
}

/// A generator with its own queue and memory.
struct Device {
    generator: Generator,
    policies: PolicyCache,
    base_models: Arc<BaseModels>,
    waiting: RefCell<VecDeque<GenerationEntry>>,
}

impl Device {
    fn new(limit: usize) -> Self {
        Device {
            generator: Generator::new(limit, "cpu".into()),
            policies: PolicyCache::new(1),
            base_models: base_models(Precision::F32),
            waiting: RefCell::default(),
        }
    }

    fn add(&self, request: GenerationRequest) -> GenerationEvents {
        let (entry, events) = entry(request);
        self.waiting.borrow_mut().push_back(entry);
        events
    }

    fn step(&mut self) -> bool {
        self.step_beside(None)
    }

    fn step_beside(&mut self, live: Option<&Live>) -> bool {
        let waiting = &self.waiting;
        let mut cx = StepContext {
            policies: &mut self.policies,
            base_models: &self.base_models,
            live,
        };
        self.generator.step(&mut cx, |fits| {
            let mut waiting = waiting.borrow_mut();
            waiting.pop_front_if(|entry| fits(entry))
        })
    }

    /// Returns the bytes of the cache that are reserved.
    fn reserved(&self) -> u64 {
        self.policies.reserved_cache()
    }
}

/// Reads what has arrived: the tokens of each sample, and the number of samples that ended.
fn read(events: &mut GenerationEvents, samples: usize) -> (Vec<Vec<Sampled>>, usize) {
    let (mut all, mut ended) = (vec![Vec::new(); samples], 0);
    while let Ok(event) = events.try_recv() {
        if let GenerationEvent::Token {
            sample,
            token,
            log_prob,
            end,
            ..
        } = event.unwrap()
        {
            all[sample].push(Sampled { token, log_prob });
            ended += usize::from(end.is_some());
        }
    }
    (all, ended)
}

#[test]
fn requests_together_get_their_tokens_with_the_log_probs_of_scoring() {
    let mut device = Device::new(100);
    let asked = [request(20, 3, 7), request(70, 1, 5), request(1, 2, 1)];
    let mut events: Vec<GenerationEvents> = asked.iter().map(|r| device.add(r.clone())).collect();
    while device.step() {}
    assert_eq!((device.reserved(), device.generator.sequences()), (0, 0));
    let policy = device.base_models.open(&base()).unwrap();
    for (request, events) in asked.iter().zip(&mut events) {
        let (all, ended) = read(events, request.samples);
        assert_eq!(ended, request.samples);
        let group = SequenceGroup {
            prompt: request.prompt.clone(),
            completions: all
                .iter()
                .map(|s| s.iter().map(|s| s.token).collect())
                .collect(),
        };
        for (got, want) in all.iter().zip(score(&policy, &[group]).unwrap()) {
            assert_eq!(got.len(), request.max_tokens);
            let got: Vec<f32> = got.iter().map(|s| s.log_prob).collect();
            assert_eq!(got, want);
        }
    }
}

#[test]
fn likely_tokens_and_those_of_the_prompt_come_with_their_log_probs() {
    let mut device = Device::new(100);
    let mut asked = request(150, 1, 5);
    asked.sampling.temperature = 0.0;
    asked.log_probs = LogProbOptions {
        top: 3,
        prompt: true,
    };
    let mut events = device.add(asked.clone());
    while device.step() {}
    let Ok(Ok(GenerationEvent::Started { prompt, .. })) = events.try_recv() else {
        panic!("the first event is another one")
    };
    let policy = device.base_models.open(&base()).unwrap();
    let group = SequenceGroup {
        prompt: asked.prompt[..1].to_vec(),
        completions: vec![asked.prompt[1..].to_vec()],
    };
    let want = score(&policy, &[group]).unwrap().remove(0);
    assert_eq!(prompt.len(), 149);
    for ((got, id), want) in prompt.iter().zip(&asked.prompt[1..]).zip(want) {
        assert_eq!((got.token.token, got.top.len()), (*id, 3));
        assert!((got.token.log_prob - want).abs() < 1e-4, "{got:?} {want}");
        assert!(got.top[0].log_prob >= got.token.log_prob);
    }
    let mut tokens = 0;
    while let Ok(event) = events.try_recv() {
        let GenerationEvent::Token {
            token,
            log_prob,
            top,
            ..
        } = event.unwrap()
        else {
            panic!("the prompt came twice")
        };
        tokens += 1;
        assert_eq!(top[0], Sampled { token, log_prob });
        assert!(top.is_sorted_by(|a, b| a.log_prob >= b.log_prob), "{top:?}");
    }
    assert_eq!(tokens, 5);
    // Without them, the tokens are the same.
    let mut plain = device.add(GenerationRequest {
        log_probs: LogProbOptions::default(),
        ..asked
    });
    while device.step() {}
    let Ok(Ok(GenerationEvent::Started { prompt, .. })) = plain.try_recv() else {
        panic!("the first event is another one")
    };
    assert!(prompt.is_empty());
    let Ok(Ok(GenerationEvent::Token { top, .. })) = plain.try_recv() else {
        panic!("there is no token")
    };
    assert!(top.is_empty());
}

#[test]
fn a_stop_token_or_a_flag_ends_one_sample_and_no_other() {
    let mut device = Device::new(100);
    let mut events = device.add(request(20, 2, 12));
    while device.step() {}
    let (all, _) = read(&mut events, 2);
    let stop = all[0][4].token;
    let first = |sample: &[Sampled]| sample.iter().position(|s| s.token == stop).unwrap_or(11);
    let mut events = device.add(GenerationRequest {
        stop_tokens: vec![stop],
        ..request(20, 2, 12)
    });
    while device.step() {}
    let (stopped, ended) = read(&mut events, 2);
    assert_eq!(ended, 2);
    for (stopped, whole) in stopped.iter().zip(&all) {
        assert_eq!(stopped[..], whole[..=first(whole)]);
    }
    let (entry, mut events) = entry(request(20, 2, 12));
    let flags = entry.stopped.clone();
    device.waiting.borrow_mut().push_back(entry);
    for _ in 0..3 {
        device.step();
    }
    flags[1].store(true, Ordering::Relaxed);
    while device.step() {}
    let (flagged, ended) = read(&mut events, 2);
    assert_eq!((flagged[0].len(), ended), (12, 1));
    assert!(flagged[1].len() < 12);
    assert_eq!(device.reserved(), 0);
}

#[test]
fn a_caller_that_does_not_read_holds_only_itself_up() {
    let mut device = Device::new(100);
    let mut slow = device.add(request(3, 1, 300));
    let mut fast = device.add(request(3, 1, 300));
    let mut tokens = 0;
    for _ in 0..100 {
        device.step();
        tokens += read(&mut fast, 1).0[0].len();
    }
    assert_eq!(
        tokens, 101,
        "one for each step, and the first with the prompt"
    );
    let (held, _) = read(&mut slow, 1);
    assert!(held[0].len() <= TOKENS_IN_CHANNEL + 1, "{}", held[0].len());
    while device.step() {
        tokens += read(&mut fast, 1).0[0].len();
        read(&mut slow, 1);
    }
    assert_eq!((tokens, device.reserved()), (300, 0));
}

#[test]
fn a_request_waits_until_the_cache_has_room_for_its_longest_text() {
    // Each takes one block for the prompt and two for its tokens.
    let mut device = Device::new(7);
    let mut events: Vec<GenerationEvents> =
        (0..3).map(|_| device.add(request(10, 1, 66))).collect();
    device.step();
    assert_eq!(device.generator.blocks(), 6);
    assert_eq!(device.waiting.borrow().len(), 1);
    events.remove(0);
    device.step();
    device.step();
    assert!(
        device.waiting.borrow().is_empty(),
        "a request waits although a caller has left"
    );
    assert_eq!(device.generator.blocks(), 6);
}

/// Reads to the end of what has arrived and returns the last event.
fn last(events: &mut GenerationEvents) -> Option<GenerationResult> {
    std::iter::from_fn(|| events.try_recv().ok()).last()
}

#[test]
fn a_request_waits_for_memory_that_others_hold_and_is_refused_if_it_alone_needs_too_much() {
    let mut device = Device::new(100);
    let _first = device.add(request(10, 1, 30));
    device.step();
    let held = device.reserved();
    // A byte less than two such requests need.
    let limit = Room::new(2 * held - 1, Arc::default(), HostMemory::new(u64::MAX), 1);
    device.policies.limit_bytes(limit);
    let mut second = device.add(request(10, 1, 30));
    device.step();
    assert_eq!(device.waiting.borrow().len(), 1, "it waits for the first");
    while device.step() {}
    let (all, ended) = read(&mut second, 1);
    assert_eq!((all[0].len(), ended, device.reserved()), (30, 1, 0));

    // A request that can never have room does not wait, and none waits behind it.
    let mut first = device.add(request(10, 1, 30));
    device.step();
    let mut large = device.add(request(10, 4, 30));
    device.step();
    let refused = large.try_recv().unwrap().unwrap_err();
    let EngineError::NoRoomToGenerate {
        needed_mib,
        available_mib,
        setting: "memory_limit",
    } = refused
    else {
        panic!("{refused:?}")
    };
    assert!(needed_mib > available_mib);
    let message = refused.to_string();
    for part in ["max_tokens", "fewer samples", "raise memory_limit"] {
        assert!(message.contains(part), "{message}");
    }
    while device.step() {}
    assert_eq!((read(&mut first, 1).1, device.reserved()), (1, 0));
}

#[test]
fn a_request_waits_for_the_memory_of_its_weights_if_others_hold_it() {
    let mut device = Device::new(100);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models/llama");
    let block = device.base_models.open(&base()).unwrap().cache_layout();
    // Room for one checkpoint and the three blocks of one request.
    let bytes = device.base_models.on_host() + 3 * block.block_bytes() as u64;
    let limit = Room::new(bytes, Arc::default(), HostMemory::new(u64::MAX), 1);
    device.policies.limit_bytes(limit);
    let ask = |content: &str| {
        let policy = WeightsRef::Full {
            model: "tiny".into(),
            dir: dir.clone(),
            content: content.into(),
        };
        let (entry, events) = entry(request(10, 2, 30));
        let entry = GenerationEntry { policy, ..entry };
        device.waiting.borrow_mut().push_back(entry);
        events
    };
    let mut events = [ask("a"), ask("b")];
    device.step();
    assert_eq!(device.waiting.borrow().len(), 1);
    while device.step() {}
    for events in &mut events {
        assert_eq!(read(events, 2).1, 2);
    }
}

#[test]
fn a_request_whose_caller_does_not_read_ends_with_a_reason() {
    let mut device = Device::new(100);
    device.generator.read_limits.pause = Duration::from_millis(5);
    let mut events = device.add(request(3, 2, 300));
    device.step();
    while device.generator.is_active() {
        device.step();
    }
    assert_eq!(device.reserved(), 0);
    let e = last(&mut events).unwrap().unwrap_err();
    assert!(matches!(e, EngineError::AnswerNotRead { .. }), "{e}");
    assert!(e.to_string().contains("read it as it comes"), "{e}");
}

#[test]
fn a_caller_that_reads_while_the_device_has_other_work_goes_on() {
    let mut device = Device::new(100);
    device.generator.read_limits.pause = Duration::from_millis(5);
    let mut events = device.add(request(3, 1, 60));
    while device.step() {}
    std::thread::sleep(Duration::from_millis(10));
    let (first, _) = read(&mut events, 1);
    while device.step() {}
    let (rest, ended) = read(&mut events, 1);
    assert_eq!((first[0].len() + rest[0].len(), ended), (60, 1));
}

#[test]
fn a_slow_reader_ends_only_if_another_request_waits_for_room() {
    // Each of the long requests takes one block for the prompt and five for its tokens.
    let mut device = Device::new(11);
    device.generator.read_limits = ReadLimits {
        pause: Duration::from_secs(3600),
        beside_others: Duration::from_millis(20),
    };
    /// Reads one event each time that the channel has been full for a millisecond. Returns the
    /// error after which nothing follows.
    fn read_slowly(
        device: &mut Device,
        events: &mut GenerationEvents,
        reads: usize,
    ) -> Option<EngineError> {
        for _ in 0..reads {
            while device.step() {}
            std::thread::sleep(Duration::from_millis(1));
            device.step();
            if let Err(e) = events.try_recv().unwrap() {
                return Some(e);
            }
        }
        None
    }
    let mut slow = device.add(request(3, 1, 300));
    assert!(read_slowly(&mut device, &mut slow, 100).is_none());
    let mut other = device.add(request(3, 1, 300));
    let e = read_slowly(&mut device, &mut slow, 200)
        .expect("the slow reader does not end although it holds the other request up");
    assert!(matches!(e, EngineError::AnswerNotRead { .. }), "{e}");
    device.step();
    assert!(device.waiting.borrow().is_empty());
    while device.generator.is_active() {
        device.step();
        last(&mut other);
    }
    assert_eq!(device.reserved(), 0);
}

#[test]
fn a_caller_has_left_only_if_samples_were_in_progress() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        let mut device = Device::new(100);
        // After a stop text the caller sets the sample's flag and drops the events.
        for stopped in [true, false] {
            let (entry, events) = entry(request(3, 2, 50));
            let flags = entry.stopped.clone();
            device.waiting.borrow_mut().push_back(entry);
            device.step();
            assert!(device.generator.is_active());
            for flag in flags.iter() {
                flag.store(stopped, Ordering::Relaxed);
            }
            drop(events);
            device.step();
            assert!(!device.generator.is_active());
            let text = handle.render();
            let is_counted = text.contains("\nbradley_generation_abandoned_total 1\n");
            assert_eq!(is_counted, !stopped, "{text}");
        }
    });
}

#[test]
fn pages_return_after_the_last_request_if_many_were_used() {
    let mut device = Device::new(100);
    let block = device.base_models.open(&base()).unwrap().cache_layout();
    let used = 2 * block.block_bytes() as u64;
    for (before, after) in [(0, used), (TRIM_BYTES - used, 0)] {
        device.generator.unreturned = before;
        let _events = device.add(request(10, 1, 30));
        device.step();
        assert_eq!(device.generator.unreturned, before, "it is in progress");
        while device.step() {}
        assert_eq!(device.generator.unreturned, after);
    }
}

#[test]
fn a_failed_pass_ends_its_requests_with_an_error() {
    let mut device = Device::new(100);
    // The second prompt has a token outside the vocabulary.
    let mut good = device.add(request(4, 1, 3));
    let mut bad = device.add(GenerationRequest {
        prompt: vec![5, 1 << 20],
        ..request(2, 1, 3)
    });
    while device.step() {}
    assert_eq!(read(&mut good, 1).1, 1);
    let e = bad.try_recv().unwrap().unwrap_err();
    assert!(
        e.to_string().contains("outside the model's vocabulary"),
        "{e}"
    );
    assert_eq!(device.reserved(), 0);
    let mut open = device.add(request(4, 1, 30));
    device.step();
    device
        .generator
        .end_all(&mut device.policies, || EngineError::Draining);
    let last = std::iter::from_fn(|| open.try_recv().ok()).last().unwrap();
    assert!(matches!(last, Err(EngineError::Draining)), "{last:?}");
    assert_eq!(device.reserved(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whoever leaves, and whenever: the blocks of all requests are free in the end.
    #[test]
    fn blocks_are_freed_however_requests_end(
        requests in prop::collection::vec((1usize..80, 1usize..4, 1usize..12, 0usize..14), 1..6),
        limit in 8usize..20,
    ) {
        let mut device = Device::new(limit);
        let mut open: Vec<(usize, GenerationEvents)> = requests
            .iter()
            .map(|(prompt, samples, tokens, leaves)| {
                (*leaves, device.add(request(*prompt, *samples, *tokens)))
            })
            .collect();
        for step in 0..200 {
            open.retain(|(leaves, _)| *leaves > step || *leaves > 12);
            device.waiting.borrow_mut().retain(|entry| !entry.is_abandoned());
            let worked = device.step();
            prop_assert!(
                device.generator.blocks() <= limit || device.generator.generating.len() == 1
            );
            if !worked && device.waiting.borrow().is_empty() {
                break;
            }
        }
        prop_assert!(device.waiting.borrow().is_empty());
        prop_assert_eq!(device.generator.blocks(), 0);
        prop_assert_eq!(device.reserved(), 0);
    }
}

#[test]
fn texts_end_for_a_run_that_needs_their_memory_and_only_for_such_a_run() {
    let mut device = Device::new(100);
    let room = 1 << 20;
    let limit = Room::new(room, Arc::default(), HostMemory::new(u64::MAX), 1);
    device.policies.limit_bytes(limit);
    let mut events = device.add(request(10, 1, 60));
    device.step();
    let held = device.reserved();
    assert!(held > 0 && held < room, "{held} of {room}");
    for (run, ends) in [(room - held, false), (room - held + 1, true)] {
        device.policies.reserve_for_run(run);
        device.generator.make_room(&mut device.policies);
        assert_eq!(device.reserved(), if ends { 0 } else { held });
        assert_eq!(device.generator.is_active(), !ends);
    }
    let mut last = None;
    while let Ok(event) = events.try_recv() {
        last = Some(event);
    }
    assert!(
        matches!(last, Some(Err(EngineError::GenerationDisplaced { .. }))),
        "{last:?}"
    );
}

#[test]
fn the_copy_of_a_running_jobs_adapter_is_reserved_before_it_is_made() {
    let mut device = Device::new(100);
    let policy = device.base_models.open(&base()).unwrap();
    let config = LoraConfig::default();
    let adapter = Adapter::init(&policy.config, &config, 7).unwrap();
    let policy = Policy {
        adapter: Some(Arc::new(adapter)),
        ..policy
    };
    let bytes = adapter_bytes(&policy);
    let live = Live {
        job: "j".into(),
        policy,
        reference: None,
        step: 3,
    };
    let ask = |device: &Device, policy: WeightsRef| {
        let (mut entry, events) = entry(request(10, 1, 60));
        entry.policy = policy;
        device.waiting.borrow_mut().push_back(entry);
        events
    };
    let of_base = ask(&device, base());
    device.step_beside(Some(&live));
    let cache = device.reserved();
    drop(of_base);
    device.step_beside(Some(&live));
    assert_eq!(device.reserved(), 0);

    let running = || WeightsRef::Live { job: "j".into() };
    let events = ask(&device, running());
    device.step_beside(Some(&live));
    assert_eq!(device.reserved(), cache + bytes);
    drop(events);
    device.step_beside(Some(&live));
    assert_eq!(device.reserved(), 0);

    // Without room for the copy, the request is refused and nothing stays reserved.
    let limit = Room::new(bytes - 1, Arc::default(), HostMemory::new(u64::MAX), 1);
    device.policies.limit_bytes(limit);
    let mut events = ask(&device, running());
    device.step_beside(Some(&live));
    let refused = events.try_recv().unwrap();
    assert!(matches!(refused, Err(EngineError::NoRoomToGenerate { .. })));
    assert_eq!(device.reserved(), 0);
}
