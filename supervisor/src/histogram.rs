//! How long things took, as Prometheus counts it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::metrics::Page;

/// The upper bounds, in seconds: the defaults of the clients of Prometheus.
const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Counts durations.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// How many took as long as each bound, and not as long as the one before; the last is for all that took longer.
    took: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Histogram {
    /// Counts one.
    pub(crate) fn count(&self, took: Duration) {
        let within = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len());
        self.took[within].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// How many were counted.
    pub(crate) fn total(&self) -> u64 {
        self.took.iter().map(|took| took.load(Ordering::Relaxed)).sum()
    }

    /// Adds the samples to a page.
    pub(crate) fn add_to(&self, page: &mut Page, name: &str, help: &str, labels: &[(&str, &str)]) {
        page.head(name, "histogram", help);
        let mut total = 0;
        for (at, took) in self.took.iter().enumerate() {
            total += took.load(Ordering::Relaxed);
            let bound = BOUNDS.get(at).map_or("+Inf".to_owned(), f64::to_string);
            let mut labels = labels.to_vec();
            labels.push(("le", &bound));
            page.sample(name, "_bucket", &labels, total as f64);
        }
        let seconds = Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)).as_secs_f64();
        page.sample(name, "_sum", labels, seconds);
        page.sample(name, "_count", labels, total as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_counts_what_is_below_it() {
        let histogram = Histogram::default();
        for milliseconds in [1, 5, 6, 20_000] {
            histogram.count(Duration::from_millis(milliseconds));
        }
        let mut page = Page::default();
        histogram.add_to(&mut page, "t", "T.", &[("a", "b")]);
        let page = page.finish();
        for line in [
            "# TYPE t histogram",
            "t_bucket{a=\"b\",le=\"0.005\"} 2",
            "t_bucket{a=\"b\",le=\"0.01\"} 3",
            "t_bucket{a=\"b\",le=\"10\"} 3",
            "t_bucket{a=\"b\",le=\"+Inf\"} 4",
            "t_sum{a=\"b\"} 20.012",
            "t_count{a=\"b\"} 4",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }
}
