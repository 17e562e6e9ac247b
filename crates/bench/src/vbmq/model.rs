//! How IOPS grow with queues: a closed queueing network, solved by mean value analysis.
//!
//! Each queue keeps a fixed number of requests going round between stations that serve one request at a time: its vCPU,
//! its I/O thread, and the storage that all queues share. Between stations a request is on its way, for a time that
//! does not depend on how many there are: cache lines that travel, wake-ups, exits, interrupts. `docs/scaling.md`
//! derives it.

use serde::Serialize;

/// What a request costs, in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Costs {
    /// Time of a vCPU.
    pub(crate) vcpu_us: f64,
    /// Time of an I/O thread.
    pub(crate) io_us: f64,
    /// Time of the storage, which is one for all queues.
    pub(crate) device_us: f64,
    /// Time in which it waits without keeping anybody else waiting.
    pub(crate) delay_us: f64,
}

/// The queues of a machine and what serves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) queues: u32,
    /// Requests in flight in each queue.
    pub(crate) qd: u32,
    /// CPUs for vCPUs, at most as many as queues.
    pub(crate) vcpus: u32,
    /// I/O threads with a CPU each, at most as many as queues.
    pub(crate) io_threads: u32,
}

/// Requests per µs of a closed network (Reiser and Lavenberg, "Mean-Value Analysis of Closed Multichain Queuing
/// Networks", J. ACM 27(2), 1980): `requests` go round between stations that need `demands` for each, and a delay.
fn throughput(requests: u32, demands: &[f64], delay: f64) -> f64 {
    let mut waiting = vec![0.0; demands.len()];
    let mut rate = 0.0;
    for n in 1..=requests {
        let time: Vec<f64> =
            demands.iter().zip(&waiting).map(|(demand, queue)| demand * (1.0 + queue)).collect();
        rate = f64::from(n) / (delay + time.iter().sum::<f64>()).max(f64::MIN_POSITIVE);
        waiting.iter_mut().zip(&time).for_each(|(queue, time)| *queue = rate * time);
    }
    rate
}

/// IOPS of `shape`. Queues that share a CPU spread their requests evenly over what they share.
pub(crate) fn iops(costs: &Costs, shape: Shape) -> f64 {
    let vcpus = shape.vcpus.clamp(1, shape.queues);
    let io_threads = shape.io_threads.clamp(1, shape.queues);
    // A station that is visited by a part of the requests has that part of the demand.
    let mut demands = vec![costs.vcpu_us / f64::from(vcpus); vcpus as usize];
    demands.extend(std::iter::repeat_n(costs.io_us / f64::from(io_threads), io_threads as usize));
    demands.push(costs.device_us);
    if vcpus == shape.queues && io_threads == shape.queues && costs.device_us == 0.0 {
        // Nothing is shared: so many networks of one queue each.
        return f64::from(shape.queues)
            * throughput(shape.qd, &[costs.vcpu_us, costs.io_us], costs.delay_us)
            * 1e6;
    }
    throughput(shape.queues * shape.qd, &demands, costs.delay_us) * 1e6
}

/// The costs with which one queue comes closest to `measured` pairs of depth and IOPS, in relative terms. What an I/O
/// thread and the storage need is known.
pub(crate) fn fit(measured: &[(u16, f64)], io_us: f64, device_us: f64) -> Option<Costs> {
    /// Steps of either cost, each a tenth of a decade.
    const STEPS: i32 = 50;
    let fastest = measured.iter().map(|(_, iops)| *iops).fold(0.0, f64::max);
    if fastest <= 0.0 {
        return None;
    }
    let slowest_us = measured.iter().map(|&(qd, iops)| f64::from(qd) * 1e6 / iops).fold(0.0, f64::max);
    let grid = |top: f64| (0..STEPS).map(move |step| top * 10_f64.powf(f64::from(step - STEPS + 1) / 10.0));
    let error = |costs: &Costs| -> f64 {
        let one = |&(qd, measured): &(u16, f64)| {
            let shape = Shape { queues: 1, qd: qd.into(), vcpus: 1, io_threads: 1 };
            (iops(costs, shape) / measured).ln().powi(2)
        };
        measured.iter().map(one).sum()
    };
    let all = grid(1e6 / fastest).flat_map(|vcpu_us| {
        grid(slowest_us).map(move |delay_us| Costs { vcpu_us, io_us, device_us, delay_us })
    });
    all.map(|costs| (error(&costs), costs)).min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, costs)| costs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs { vcpu_us: 0.1, io_us: 0.2, device_us: 0.0, delay_us: 0.5 };

    fn near(a: f64, b: f64) -> bool {
        (a / b - 1.0).abs() < 0.01
    }

    fn shape(queues: u32, qd: u32, vcpus: u32, io_threads: u32) -> Shape {
        Shape { queues, qd, vcpus, io_threads }
    }

    #[test]
    fn one_request_takes_the_sum_and_many_take_the_bottleneck() {
        assert!(near(iops(&COSTS, shape(1, 1, 1, 1)), 1e6 / 0.8));
        assert!(near(iops(&COSTS, shape(1, 1000, 1, 1)), 1e6 / 0.2));
    }

    #[test]
    fn two_equal_stations_are_as_the_textbook_says() {
        // n / ((n + 1) D) for two stations of demand D without delay.
        let costs = Costs { vcpu_us: 1.0, io_us: 1.0, ..Costs::default() };
        for n in [1, 2, 8] {
            assert!(near(iops(&costs, shape(1, n, 1, 1)), f64::from(n) / f64::from(n + 1) * 1e6));
        }
    }

    #[test]
    fn queues_of_their_own_add_up_and_a_shared_thread_is_a_ceiling() {
        let one = iops(&COSTS, shape(1, 32, 1, 1));
        assert!(near(iops(&COSTS, shape(64, 32, 64, 64)), 64.0 * one));
        let shared: Vec<_> = [1, 2, 8, 64].map(|k| iops(&COSTS, shape(k, 32, k, 1))).into();
        assert!(shared.is_sorted() && shared.iter().all(|&iops| iops <= 1e6 / 0.2 * 1.001), "{shared:?}");
    }

    #[test]
    fn storage_limits_all_queues_together() {
        let costs = Costs { device_us: 5.0, ..COSTS };
        assert!(iops(&costs, shape(64, 32, 64, 64)) <= 1e6 / 5.0 * 1.001);
        assert!(near(iops(&costs, shape(64, 128, 64, 64)), 1e6 / 5.0));
    }

    #[test]
    fn costs_are_found_again_from_what_they_lead_to() {
        let costs = Costs { vcpu_us: 0.31, io_us: 0.05, device_us: 0.0, delay_us: 30.0 };
        let measured = [1, 32, 128].map(|qd| (qd, iops(&costs, shape(1, qd.into(), 1, 1))));
        let found = fit(&measured, costs.io_us, 0.0).unwrap();
        for (qd, wanted) in measured {
            let found = iops(&found, shape(1, qd.into(), 1, 1));
            assert!((found / wanted - 1.0).abs() < 0.15, "{qd} in flight: {found} for {wanted}");
        }
        assert!(fit(&[], 0.1, 0.0).is_none());
        assert!(fit(&[(1, 0.0)], 0.1, 0.0).is_none());
    }
}
