//! Lists of CPUs as people and the kernel write them: `2-5,7`.

use std::fmt;
use std::str::FromStr;

/// CPU numbers are below this: the size of the affinity mask that the kernel is asked for.
pub const CPUS_MAX: u32 = 1024;

/// CPU numbers without duplicates, in the order they were named. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<u32>);

/// What is wrong with a CPU list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    /// Nothing, or nothing between two commas.
    #[error("CPU list `{list}` has an empty item; write it like `2-5,7`")]
    Empty {
        /// The list as given.
        list: String,
    },
    /// Neither a number nor two numbers with a dash between them.
    #[error("CPU list `{list}`: `{item}` is not a CPU number below {CPUS_MAX} or a range like `2-5`")]
    Item {
        /// The list as given.
        list: String,
        /// The part that is wrong.
        item: String,
    },
    /// A range that ends before it begins.
    #[error("CPU list `{list}`: range `{item}` runs backwards")]
    Backwards {
        /// The list as given.
        list: String,
        /// The part that is wrong.
        item: String,
    },
    /// A CPU that is in the list more than once.
    #[error("CPU list `{list}` names CPU {cpu} twice")]
    Twice {
        /// The list as given.
        list: String,
        /// The CPU.
        cpu: u32,
    },
}

impl CpuList {
    /// The CPUs in the order they were named.
    #[must_use]
    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let list = || text.trim().to_owned();
        let mut cpus = Vec::new();
        for item in text.trim().split(',').map(str::trim) {
            if item.is_empty() {
                return Err(CpuListError::Empty { list: list() });
            }
            let wrong = || CpuListError::Item { list: list(), item: item.to_owned() };
            let number = |text: &str| number(text).ok_or_else(wrong);
            let (first, last) = match item.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(item)?, number(item)?),
            };
            if first > last {
                return Err(CpuListError::Backwards { list: list(), item: item.to_owned() });
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(CpuListError::Twice { list: list(), cpu });
                }
                cpus.push(cpu);
            }
        }
        Ok(Self(cpus))
    }
}

fn number(text: &str) -> Option<u32> {
    let digits = text.trim();
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|&cpu| plain && cpu < CPUS_MAX)
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format_cpus(&self.0))
    }
}

/// Writes CPUs as a list, ascending runs of three or more as ranges: `0,1,4-6`. Empty for none.
#[must_use]
pub fn format_cpus(cpus: &[u32]) -> String {
    cpus.chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .flat_map(|run| match run {
            [first, .., last] if run.len() > 2 => vec![format!("{first}-{last}")],
            run => run.iter().map(u32::to_string).collect(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Vec<u32>, String> {
        text.parse::<CpuList>().map(|list| list.0).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_are_read_in_the_order_given() {
        assert_eq!(parse("2-5,7"), Ok(vec![2, 3, 4, 5, 7]));
        assert_eq!(parse(" 7, 2-3\n"), Ok(vec![7, 2, 3]));
        assert_eq!(parse("0"), Ok(vec![0]));
        assert_eq!(parse("1023"), Ok(vec![1023]));
    }

    #[test]
    fn errors_say_which_part_is_wrong() {
        for (text, error) in [
            ("", "CPU list `` has an empty item; write it like `2-5,7`"),
            ("1,,2", "CPU list `1,,2` has an empty item; write it like `2-5,7`"),
            ("1,x", "CPU list `1,x`: `x` is not a CPU number below 1024 or a range like `2-5`"),
            ("1024", "CPU list `1024`: `1024` is not a CPU number below 1024 or a range like `2-5`"),
            ("+1", "CPU list `+1`: `+1` is not a CPU number below 1024 or a range like `2-5`"),
            ("-1", "CPU list `-1`: `-1` is not a CPU number below 1024 or a range like `2-5`"),
            ("1-2-3", "CPU list `1-2-3`: `1-2-3` is not a CPU number below 1024 or a range like `2-5`"),
            ("5-2", "CPU list `5-2`: range `5-2` runs backwards"),
            ("1-3,2", "CPU list `1-3,2` names CPU 2 twice"),
        ] {
            assert_eq!(parse(text), Err(error.to_owned()));
        }
    }

    #[test]
    fn runs_are_written_as_ranges() {
        assert_eq!(format_cpus(&[0, 1, 4, 5, 6, 9]), "0,1,4-6,9");
        assert_eq!(format_cpus(&[3, 2, 1]), "3,2,1");
        assert_eq!(format_cpus(&[]), "");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(cpus in proptest::sample::subsequence((0..64_u32).collect::<Vec<_>>(), 1..20)) {
            let list = CpuList(cpus);
            prop_assert_eq!(list.to_string().parse(), Ok(list));
        }

        #[test]
        fn no_text_panics(text in "[0-9,\\- x]{0,12}") {
            let _ = text.parse::<CpuList>();
        }
    }
}
