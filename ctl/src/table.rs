//! Tables as Docker prints them: columns of the width of their longest cell, at least ten, with three blanks between.

use std::io::{self, Write};

const MIN_WIDTH: usize = 10;
const PADDING: usize = 3;

/// Rows of cells under a heading.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with its heading.
    pub(crate) fn new(heading: &[&str]) -> Table {
        Table { rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Appends a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Writes heading and rows. Control characters in cells, which may come from an image, become `?`, so that they
    /// cannot steer a terminal.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count() + PADDING).max().unwrap_or(0).max(MIN_WIDTH)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let clean: String = cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
                line.push_str(&format!("{clean:width$}"));
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_have_the_width_of_the_longest_cell() {
        let mut table = Table::new(&["ID", "IMAGE", "NAMES"]);
        table.row(vec!["123456789012".to_owned(), "é".to_owned(), "x\u{1b}[31m".to_owned()]);
        table.row(vec![String::new(), "a".repeat(20), String::new()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        let want = "ID             IMAGE                  NAMES\n123456789012   é                      x?[31m\n               \
                    aaaaaaaaaaaaaaaaaaaa\n";
        assert_eq!(String::from_utf8(out).unwrap(), want);
    }
}
