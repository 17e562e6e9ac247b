//! Requests in flight when a service dies: the next one takes exactly those again, in their order.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use proptest::prelude::*;
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::memory::Mapping;
use virtio::ring::{Buffer, RingFormat, Token, Used};
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

#[test]
fn a_service_that_dies_while_publishing_repeats_nothing() {
    use std::sync::atomic::Ordering;
    for format in FORMATS {
        let mut scene = Scene::new(format);
        let buffers: Vec<[Buffer; 1]> = (0..3).map(|_| [scene.fake.writable(8)]).collect();
        for buffer in &buffers {
            scene.fake.ring.add(buffer).unwrap();
        }
        scene.fake.ring.publish();
        let mut queue = scene.service();
        let tokens = pop(&mut queue, 3);
        queue.complete(tokens.into_iter().map(|token| Used { token, written: 0 }));
        // What publishing does up to and including the store that the driver sees; then killed.
        let ring = scene.fake.ring_config();
        match format {
            RingFormat::Split => scene.fake.area(ring.device, 4).u16(2).store(3, Ordering::Release),
            RingFormat::Packed => {
                let record = virtio::memory::Area::new(scene.record.clone(), 0, 64, 8).unwrap();
                record.u16(16).store(3, Ordering::Release);
                record.u8(20).store(1, Ordering::Release);
                scene.fake.area(ring.desc, 16).u16(14).store(0x8080, Ordering::Release);
            }
        }
        drop(queue);
        assert_eq!(pop(&mut scene.service(), 8).len(), 0, "{format:?}");
        assert_eq!(scene.reap().len(), 3, "{format:?}");
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
