//! Requests completed in each millisecond.
//!
//! On a shared machine the mean rate mostly measures the neighbours. The 90th percentile of the rates of single
//! milliseconds is what the server does while it has its core to itself.

/// Length of a window.
pub(crate) const WINDOW_NS: u64 = 1_000_000;

/// Completions per window, for a run whose longest duration is known beforehand.
#[derive(Debug)]
pub(crate) struct Windows {
    counts: Vec<u32>,
    end_ns: u64,
    start_ns: u64,
    current: usize,
}

impl Windows {
    /// Room for `duration_ms` windows; later ones are not counted.
    pub(crate) fn new(duration_ms: u64) -> Self {
        let counts = vec![0; usize::try_from(duration_ms).unwrap_or(0) + 1];
        Self { counts, end_ns: 0, start_ns: 0, current: 0 }
    }

    /// Forgets everything; the first window begins at `now_ns`.
    pub(crate) fn restart(&mut self, now_ns: u64) {
        self.counts.fill(0);
        self.start_ns = now_ns;
        self.end_ns = now_ns + WINDOW_NS;
        self.current = 0;
    }

    /// Counts `completed` requests at `now_ns`, which does not go back.
    #[inline(always)]
    pub(crate) fn add(&mut self, now_ns: u64, completed: u32) {
        if now_ns >= self.end_ns {
            self.current = ((now_ns - self.start_ns) / WINDOW_NS) as usize;
            self.end_ns = self.start_ns + (self.current as u64 + 1) * WINDOW_NS;
        }
        if let Some(count) = self.counts.get_mut(self.current) {
            *count += completed;
        }
    }

    /// The rate, in requests per second, that a fraction of the complete windows up to `now_ns` does not exceed.
    pub(crate) fn quantile(&self, fraction: f64, now_ns: u64) -> Option<f64> {
        let complete = (now_ns.saturating_sub(self.start_ns) / WINDOW_NS) as usize;
        let mut counts = self.counts[..complete.min(self.counts.len())].to_vec();
        counts.sort_unstable();
        let rank = (fraction * counts.len() as f64).ceil() as usize;
        let count = counts.get(rank.max(1) - 1)?;
        Some(f64::from(*count) * (1e9 / WINDOW_NS as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_fall_into_the_window_of_their_completion() {
        let mut windows = Windows::new(10);
        windows.restart(5_000);
        windows.add(5_000, 1);
        windows.add(5_000 + WINDOW_NS - 1, 2);
        windows.add(5_000 + WINDOW_NS, 4);
        windows.add(5_000 + 3 * WINDOW_NS, 8);
        assert_eq!(windows.counts[..5], [3, 4, 0, 8, 0]);
    }

    #[test]
    fn the_90th_percentile_ignores_the_window_that_is_not_over() {
        let mut windows = Windows::new(20);
        windows.restart(0);
        for window in 0..10 {
            windows.add(window * WINDOW_NS, window as u32 + 1);
        }
        windows.add(10 * WINDOW_NS, 1000);
        assert_eq!(windows.quantile(0.9, 10 * WINDOW_NS + 7), Some(9_000.0));
        assert_eq!(windows.quantile(0.5, 10 * WINDOW_NS + 7), Some(5_000.0));
    }

    #[test]
    fn windows_without_a_request_count_as_zero() {
        let mut windows = Windows::new(20);
        windows.restart(0);
        windows.add(9 * WINDOW_NS, 7);
        assert_eq!(windows.quantile(0.9, 10 * WINDOW_NS), Some(0.0));
        assert_eq!(windows.quantile(1.0, 10 * WINDOW_NS), Some(7_000.0));
    }

    #[test]
    fn a_run_without_a_whole_window_has_no_rate() {
        let mut windows = Windows::new(20);
        windows.restart(0);
        windows.add(1, 1);
        assert_eq!(windows.quantile(0.9, 10), None);
    }

    #[test]
    fn what_comes_after_the_last_window_is_not_counted() {
        let mut windows = Windows::new(1);
        windows.restart(0);
        windows.add(50 * WINDOW_NS, 3);
        assert_eq!(windows.counts, [0, 0]);
    }
}
