//! `stockade list`: all containers below a root, as a table or as JSON.

use super::state::Shown;
use super::{Error, Global, Outcome, print};
use crate::state::{self, State, StateDir};

const HEADER: [&str; 6] = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];

pub fn list(global: &Global, args: liboci_cli::List) -> Outcome {
    let mut states = Vec::new();
    for id in StateDir::list(&global.root)? {
        match StateDir::open(&global.root, &id).and_then(|dir| dir.load()) {
            Ok(state) => states.push(state),
            // It was removed while we looked, or is not there yet.
            Err(state::Error::Missing { .. } | state::Error::Unfinished(_)) => {}
            Err(e) => tracing::warn!("{e}"),
        }
    }
    if args.quiet {
        return print(&states.iter().map(|state| format!("{}\n", state.id)).collect::<String>());
    }
    match args.format.as_str() {
        "table" => print(&table(&states)),
        "json" => {
            let shown: Vec<_> = states.iter().map(Shown::from).collect();
            // runc prints null for none, and callers parse it as an empty list.
            let text = if shown.is_empty() { Ok("null".into()) } else { serde_json::to_string(&shown) };
            print(&text.map_err(|e| Error::Io("show the list".into(), e.into()))?)
        }
        other => Err(Error::Usage(format!("--format {other:?} is not known: it is table or json"))),
    }
}

fn table(states: &[State]) -> String {
    let mut rows = vec![HEADER.map(String::from)];
    rows.extend(states.iter().map(|state| {
        let shown = Shown::from(state);
        [
            shown.id.to_owned(),
            shown.pid.to_string(),
            shown.status.as_str().to_owned(),
            shown.bundle.clone(),
            shown.created.to_owned(),
            shown.owner,
        ]
    }));
    columns(&rows)
}

/// Aligned as Go's tabwriter does it for runc: at least 12 wide, 3 apart, the last column as it is.
pub fn columns(rows: &[impl AsRef<[String]>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows.iter().map(AsRef::as_ref) {
        widths.resize(widths.len().max(row.len()), 12);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count() + 3);
        }
    }
    let mut text = String::new();
    for row in rows.iter().map(AsRef::as_ref) {
        if let Some((last, cells)) = row.split_last() {
            for (cell, width) in cells.iter().zip(&widths) {
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
            }
            text.push_str(last);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_wide_enough_and_aligned() {
        let rows = [["ID", "PID", "X"], ["a-rather-long-id", "7", "y"]].map(|row| row.map(String::from));
        assert_eq!(columns(&rows), "ID                 PID         X\na-rather-long-id   7           y\n");
    }
}
