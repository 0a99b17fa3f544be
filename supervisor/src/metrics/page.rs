//! The text format 0.0.4 of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;

/// A page that is being written: the samples of one metric must stand together, below one head.
#[derive(Debug, Default)]
pub struct Page {
    metrics: BTreeMap<String, String>,
}

impl Page {
    /// Adds a metric, or a sample of one that is there already. What cannot stand in a label is escaped.
    pub fn add(&mut self, name: &str, kind: &str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.head(name, kind, help);
        self.sample(name, "", labels, value);
    }

    /// Begins a metric, if it is not there.
    pub fn head(&mut self, name: &str, kind: &str, help: &str) {
        if !self.metrics.contains_key(name) {
            self.metrics.insert(name.to_owned(), format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        }
    }

    /// Adds a sample of a metric that was begun; those of a histogram have names that end with `suffix`.
    pub fn sample(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let Some(samples) = self.metrics.get_mut(name) else { return };
        samples.push_str(name);
        samples.push_str(suffix);
        for (at, (label, text)) in labels.iter().enumerate() {
            samples.push(if at == 0 { '{' } else { ',' });
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            // Writing to a text cannot fail.
            let _ = write!(samples, "{label}=\"{text}\"");
        }
        let _ = writeln!(samples, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// The page, its metrics in the order of their names.
    pub fn finish(self) -> String {
        self.metrics.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_metric_stand_together() {
        let mut page = Page::default();
        page.add("b", "gauge", "B.", &[("x", "1\"\\\n")], 1.0);
        page.add("a", "counter", "A.", &[], 0.5);
        page.add("b", "gauge", "B.", &[("x", "2"), ("y", "3")], 18_446_744_073_709_551_615_u64 as f64);
        let expected = "# HELP a A.\n# TYPE a counter\na 0.5\n# HELP b B.\n# TYPE b gauge\n\
                        b{x=\"1\\\"\\\\\\n\"} 1\nb{x=\"2\",y=\"3\"} 18446744073709552000\n";
        assert_eq!(page.finish(), expected);
    }
}
