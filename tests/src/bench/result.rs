//! What was measured: rows of minimum, median and maximum, as `results.json` holds them.

use serde::Serialize;

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was done.
    pub case: String,
    /// By which runtime.
    pub runtime: String,
    /// What was looked at.
    pub metric: String,
    /// In which unit; `virtual_s` are seconds of the lab's virtual clock, 2 ns an instruction.
    pub unit: String,
    /// How many times.
    pub runs: usize,
    /// The smallest value.
    pub min: f64,
    /// The middle value.
    pub median: f64,
    /// The largest value.
    pub max: f64,
}

/// All figures of a benchmark, in the order in which they were measured, and what is to be said about them.
#[derive(Debug, Default)]
pub struct Results {
    /// The figures.
    pub rows: Vec<Row>,
    /// Remarks for the report, such as a run that had to be repeated.
    pub notes: Vec<String>,
}

impl Results {
    /// Adds a figure from its samples, of which there is at least one.
    pub fn add(&mut self, case: &str, runtime: &str, metric: &str, unit: &str, samples: &[f64]) {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { return };
        self.rows.push(Row {
            case: case.into(),
            runtime: runtime.into(),
            metric: metric.into(),
            unit: unit.into(),
            runs: sorted.len(),
            min: rounded(*min),
            median: rounded(median(&sorted)),
            max: rounded(*max),
        });
    }

    /// The rows of a case whose metric begins with `prefix`.
    pub fn of<'a>(&'a self, case: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.case == case && row.metric.starts_with(prefix))
    }

    /// The median of one figure, if it was measured.
    pub fn median(&self, case: &str, runtime: &str, metric: &str) -> Option<f64> {
        let same = |row: &&Row| (&*row.case, &*row.runtime, &*row.metric) == (case, runtime, metric);
        self.rows.iter().find(same).map(|row| row.median)
    }

    /// An array of all rows.
    pub fn to_json(&self) -> String {
        // Strings and finite numbers always serialise.
        serde_json::to_string_pretty(&self.rows).unwrap_or_default() + "\n"
    }
}

/// The middle of a sorted, non-empty list; of two middle values their mean.
fn median(sorted: &[f64]) -> f64 {
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => at(n / 2),
        n => (at(n / 2 - 1) + at(n / 2)) / 2.0,
    }
}

/// To six digits after the point: microseconds, which is below what differs from run to run.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_minimum_median_and_maximum_of_its_samples() {
        let mut results = Results::default();
        results.add("case", "runc", "time", "virtual_s", &[0.3, 0.1, 0.2]);
        results.add("case", "crun", "time", "virtual_s", &[4.0, 1.0, 2.0, 3.0]);
        let [odd, even] = &results.rows[..] else { panic!("two rows") };
        assert_eq!((odd.min, odd.median, odd.max, odd.runs), (0.1, 0.2, 0.3, 3));
        assert_eq!((even.min, even.median, even.max, even.runs), (1.0, 2.5, 4.0, 4));
    }

    #[test]
    fn results_json_is_an_array_of_objects_with_the_agreed_keys() {
        let mut results = Results::default();
        results.add("run-echo", "stockade", "time", "virtual_s", &[0.25]);
        let json: serde_json::Value = serde_json::from_str(&results.to_json()).unwrap();
        let keys: Vec<_> = json[0].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["case", "max", "median", "metric", "min", "runs", "runtime", "unit"]);
    }
}
