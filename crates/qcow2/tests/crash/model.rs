//! What a guest may find after a crash, sector by sector.

use crate::reader::Value;

#[derive(Clone, Default)]
struct Sector {
    /// After the death of the service: what was acknowledged last, and what is on its way.
    kill: Vec<Value>,
    /// After the death of the host: what was flushed last, and all that came since.
    power: Vec<Value>,
    /// Came since the flush began that is under way.
    since: Vec<Value>,
    /// `kill` when it began.
    mark: Vec<Value>,
}

fn add(values: &mut Vec<Value>, value: Value) {
    if !values.contains(&value) {
        values.push(value);
    }
}

/// The disk as its guest knows it.
pub(crate) struct Model {
    sectors: Vec<Sector>,
    flushing: bool,
}

impl Model {
    pub(crate) fn new(values: Vec<Value>) -> Self {
        let sector = |value| Sector { kill: vec![value], power: vec![value], ..Sector::default() };
        Self { sectors: values.into_iter().map(sector).collect(), flushing: false }
    }

    pub(crate) fn begin_write(&mut self, sectors: std::ops::Range<u64>, value: Value) {
        for sector in &mut self.sectors[sectors.start as usize..sectors.end as usize] {
            add(&mut sector.kill, value);
            add(&mut sector.power, value);
            add(&mut sector.since, value);
        }
    }

    pub(crate) fn end_write(&mut self, sectors: std::ops::Range<u64>, value: Value) {
        for sector in &mut self.sectors[sectors.start as usize..sectors.end as usize] {
            sector.kill = vec![value];
        }
    }

    pub(crate) fn begin_flush(&mut self) -> bool {
        if std::mem::replace(&mut self.flushing, true) {
            return false;
        }
        for sector in &mut self.sectors {
            sector.mark = sector.kill.clone();
            sector.since.clear();
        }
        true
    }

    pub(crate) fn end_flush(&mut self) {
        self.flushing = false;
        for sector in &mut self.sectors {
            sector.power = std::mem::take(&mut sector.mark);
            for value in std::mem::take(&mut sector.since) {
                add(&mut sector.power, value);
            }
        }
    }

    pub(crate) fn check(&self, values: &[Value], power_cut: bool) -> Result<(), String> {
        for (index, (sector, value)) in self.sectors.iter().zip(values).enumerate() {
            let allowed = if power_cut { &sector.power } else { &sector.kill };
            if !allowed.contains(value) {
                return Err(format!("sector {index} reads {value:#x}, not one of {allowed:x?}"));
            }
        }
        Ok(())
    }

    /// The service died and left these; nothing is on its way any more.
    pub(crate) fn killed(&mut self, values: &[Value]) {
        self.flushing = false;
        for (sector, &value) in self.sectors.iter_mut().zip(values) {
            sector.kill = vec![value];
            sector.mark.clear();
        }
    }
}
