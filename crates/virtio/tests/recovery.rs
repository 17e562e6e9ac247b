//! Requests in flight when a service dies: the next one takes exactly those again, in their order.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::memory::{Area, Mapping};
use virtio::ring::{Buffer, RingError, RingFormat, Token, Used};
use virtio::{Inflight, Queue};

const SIZE: u16 = 8;
const FORMATS: [RingFormat; 2] = [RingFormat::Split, RingFormat::Packed];

struct Scene {
    fake: FakeDriver,
    record: Arc<Mapping>,
    format: RingFormat,
}

impl Scene {
    fn new(format: RingFormat) -> Self {
        let fake = FakeDriver::new(FakeOptions { format, size: SIZE, ..FakeOptions::default() });
        let (record, _file) = Mapping::anonymous("inflight", 4096).unwrap();
        Self { fake, record: Arc::new(record), format }
    }

    /// A service that finds the record. The front end tells it nothing about where the ring stands.
    fn service(&self) -> Queue {
        let mut config = self.fake.queue_config();
        config.inflight = Some(Inflight::new(self.format, self.record.clone(), 0, SIZE).unwrap());
        Queue::new(config).unwrap().0
    }

    fn reap(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.fake.ring.reap().unwrap()).map(|c| c.id).collect()
    }
}

fn pop(queue: &mut Queue, max: usize) -> Vec<Token> {
    let mut tokens = Vec::new();
    queue.pop(max, &mut tokens);
    tokens
}

fn give_back(queue: &mut Queue, tokens: Vec<Token>) {
    queue.complete(tokens.into_iter().map(|token| Used { token, written: 5 }));
    queue.publish();
}

fn ids(queue: &Queue, tokens: &[Token]) -> Vec<u16> {
    tokens.iter().map(|t| queue.chains().id(t)).collect()
}

#[test]
fn requests_of_a_dead_service_are_taken_again_in_their_order() {
    for format in FORMATS {
        let mut scene = Scene::new(format);
        let mut queue = scene.service();
        let buffers: Vec<[Buffer; 1]> = (0..6).map(|_| [scene.fake.writable(8)]).collect();
        let heads: Vec<u16> = buffers.iter().map(|b| scene.fake.ring.add(b).unwrap()).collect();
        scene.fake.ring.publish();
        let mut tokens = pop(&mut queue, 4);
        assert_eq!(tokens.len(), 4);
        // The second one is done, the rest were in flight when the service died.
        give_back(&mut queue, vec![tokens.remove(1)]);
        drop((queue, tokens));

        let mut queue = scene.service();
        let tokens = pop(&mut queue, 2);
        assert_eq!(ids(&queue, &tokens), [heads[0], heads[2]], "{format:?}");
        let more = pop(&mut queue, 8);
        assert_eq!(ids(&queue, &more), [heads[3]], "{format:?}: the old ones first");
        let rest = pop(&mut queue, 8);
        assert_eq!(ids(&queue, &rest), [heads[4], heads[5]], "{format:?}");
        give_back(&mut queue, tokens.into_iter().chain(more).chain(rest).collect());
        let mut done = scene.reap();
        done.sort_unstable();
        let mut all = heads.clone();
        all.sort_unstable();
        assert_eq!(done, all, "{format:?}: each exactly once");
        drop(queue);
        assert_eq!(pop(&mut scene.service(), 8).len(), 0);
    }
}

#[test]
fn a_service_that_dies_before_publishing_does_the_work_again() {
    for format in FORMATS {
        let mut scene = Scene::new(format);
        let buffers: Vec<[Buffer; 1]> = (0..3).map(|_| [scene.fake.writable(8)]).collect();
        let heads: Vec<u16> = buffers.iter().map(|b| scene.fake.ring.add(b).unwrap()).collect();
        scene.fake.ring.publish();
        let mut queue = scene.service();
        let tokens = pop(&mut queue, 3);
        queue.complete(tokens.into_iter().map(|token| Used { token, written: 0 }));
        drop(queue);
        assert_eq!(scene.reap(), [], "{format:?}: nothing was published");
        let mut queue = scene.service();
        let mut tokens = pop(&mut queue, 8);
        assert_eq!(ids(&queue, &tokens), heads, "{format:?}");
        // In another order than before, one by one: what the dead service wrote into the ring must not be seen.
        tokens.reverse();
        for token in tokens {
            let id = queue.chains().id(&token);
            give_back(&mut queue, vec![token]);
            assert_eq!(scene.reap(), [id], "{format:?}");
        }
    }
}

/// Writes 16-bit words into a record.
fn spoil(record: &Arc<Mapping>, words: &[(usize, u16)]) {
    let area = Area::new(record.clone(), 0, 4096, 8).unwrap();
    words.iter().for_each(|&(at, word)| area.u16(at).store(word, Ordering::Relaxed));
}

#[test]
fn a_packed_record_that_no_service_leaves_is_refused() {
    const ENTRY: usize = 32;
    let entry = |index: usize| 32 + ENTRY * index;
    // Each begins with two chains in flight: entry 0, then 1 and 2; the others are free.
    let damages: [(&str, Vec<(usize, u16)>); 7] = [
        ("a chain of none", vec![(entry(0) + 6, 0)]),
        ("a chain longer than the ring", vec![(entry(1) + 6, 0xffff)]),
        ("two chains that share an entry", vec![(entry(0) + 6, 2)]),
        ("a chain that leads into the free list", vec![(entry(1) + 2, 5)]),
        ("a chain that is a loop", vec![(entry(1) + 2, 1)]),
        ("a free list that is a loop", vec![(entry(4) + 2, 3)]),
        ("an entry in no list", vec![(entry(0), 0)]),
    ];
    for (what, words) in damages {
        let mut scene = Scene::new(RingFormat::Packed);
        let mut queue = scene.service();
        let buffers = [scene.fake.readable(&[1]), scene.fake.writable(8)];
        scene.fake.offer(&buffers[1..], false);
        scene.fake.offer(&buffers, false);
        assert_eq!(pop(&mut queue, 8).len(), 2);
        drop(queue);
        assert_eq!(scene.service().in_flight(), 0, "so far it is sound");
        spoil(&scene.record, &words);
        let mut config = scene.fake.queue_config();
        config.inflight = Some(Inflight::new(scene.format, scene.record.clone(), 0, SIZE).unwrap());
        let error = Queue::new(config).err();
        assert_eq!(error, Some(RingError::BadRecord { size: SIZE }), "{what}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The front end keeps the record, and writes it as it likes.
    #[test]
    fn no_record_makes_a_device_panic_or_hold_more_than_the_ring_has(
        packed: bool,
        mut words in prop::collection::vec((0usize..160, prop_oneof![4 => 0u16..10, 1 => any::<u16>()]), 0..40),
        during in prop::collection::vec((0usize..160, any::<u16>()), 0..40),
    ) {
        let format = FORMATS[usize::from(packed)];
        let scene = Scene::new(format);
        drop(scene.service());
        words.retain(|&(at, _)| !(4..6).contains(&at));
        spoil(&scene.record, &words.iter().map(|&(at, word)| (2 * at, word)).collect::<Vec<_>>());
        let mut config = scene.fake.queue_config();
        config.inflight = Some(Inflight::new(format, scene.record.clone(), 0, SIZE).unwrap());
        if let Ok((mut queue, _)) = Queue::new(config) {
            spoil(&scene.record, &during.iter().map(|&(at, word)| (2 * at, word)).collect::<Vec<_>>());
            let tokens = pop(&mut queue, 64);
            prop_assert!(tokens.len() <= SIZE.into());
            give_back(&mut queue, tokens);
            prop_assert_eq!(queue.in_flight(), 0);
        }
    }
}

/// What happens in one round.
#[derive(Clone, Debug)]
enum Step {
    Offer(usize),
    Pop(usize),
    Complete(usize),
    Publish,
    Die,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1usize..4).prop_map(Step::Offer),
        4 => (1usize..5).prop_map(Step::Pop),
        4 => (0usize..8).prop_map(Step::Complete),
        3 => Just(Step::Publish),
        2 => Just(Step::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn however_often_it_dies_each_request_comes_back_once(
        packed: bool,
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let format = FORMATS[usize::from(packed)];
        let mut scene = Scene::new(format);
        let buffer = scene.fake.writable(8);
        let mut queue = scene.service();
        let mut held: Vec<Token> = Vec::new();
        let mut outstanding: Vec<u16> = Vec::new();
        let finish = |scene: &mut Scene, outstanding: &mut Vec<u16>| {
            for id in scene.reap() {
                let at = outstanding.iter().position(|&o| o == id);
                prop_assert!(at.is_some(), "{id} came back and is not in flight");
                outstanding.swap_remove(at.unwrap());
            }
            Ok(())
        };
        for step in steps {
            match step {
                Step::Offer(length) => {
                    if let Some(id) = scene.fake.ring.add(&vec![buffer; length]) {
                        outstanding.push(id);
                        scene.fake.ring.publish();
                    }
                }
                Step::Pop(max) => queue.pop(max, &mut held),
                Step::Complete(n) if !held.is_empty() => {
                    let token = held.swap_remove(n % held.len());
                    queue.complete(std::iter::once(Used { token, written: 1 }));
                }
                Step::Complete(_) => {}
                Step::Publish => queue.publish(),
                Step::Die => {
                    held.clear();
                    drop(queue);
                    finish(&mut scene, &mut outstanding)?;
                    queue = scene.service();
                }
            }
            prop_assert!(!queue.is_broken());
            finish(&mut scene, &mut outstanding)?;
        }
        // In the end everything comes back.
        for _ in 0..20 {
            queue.pop(8, &mut held);
            queue.complete(held.drain(..).map(|token| Used { token, written: 1 }));
            queue.publish();
            finish(&mut scene, &mut outstanding)?;
        }
        prop_assert_eq!(outstanding, []);
    }
}
