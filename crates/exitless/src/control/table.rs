//! Tables for people.

use std::fmt;

/// Rows of cells under headings. Columns of numbers are flush right.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(ToString::to_string).collect()] }
    }

    pub(super) fn row<const CELLS: usize>(&mut self, cells: [String; CELLS]) {
        self.rows.push(cells.into());
    }

    /// Whether there are only headings.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows[0].len();
        let column = |index: usize| self.rows.iter().map(move |row| row[index].as_str());
        let widths: Vec<_> = (0..columns).map(|i| column(i).map(|cell| cell.chars().count()).max()).collect();
        let is_number = |cell: &str| cell.starts_with(|first: char| first.is_ascii_digit()) || cell == "-";
        let right: Vec<_> = (0..columns).map(|i| column(i).skip(1).all(is_number)).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (index, cell) in row.iter().enumerate() {
                let width = widths[index].unwrap_or(0);
                if index > 0 {
                    line.push_str("  ");
                }
                line.push_str(&if right[index] {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                });
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A number of bytes to about three digits.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = (bytes.checked_ilog2().unwrap_or(0) / 10) as usize;
    let number = bytes as f64 / (1_u64 << (10 * power)) as f64;
    let decimals = if power == 0 || number >= 100.0 { 0 } else { 1 };
    format!("{number:.decimals$} {}", UNITS[power])
}

/// `part` of `whole` to one decimal.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

/// How many times `b` goes into `a`, to one decimal.
pub(super) fn ratio(a: u64, b: u64) -> String {
    if b == 0 { "-".to_owned() } else { format!("{:.1}", a as f64 / b as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table = Table::new(&["DEVICE", "N", "WHERE"]);
        table.row(["a".into(), "5".into(), "x".into()]);
        table.row(["longer-name".into(), "1234".into(), "y".into()]);
        assert_eq!(
            table.to_string(),
            "DEVICE          N  WHERE\na               5  x\nlonger-name  1234  y\n"
        );
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(percent(0, 0), "-");
        assert_eq!(ratio(7, 2), "3.5");
    }
}
