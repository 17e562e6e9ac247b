//! The processor's time-stamp counter, and whether it may serve as a clock.
//!
//! Unsafe is needed for two instructions that have no safe name on all supported compilers: `rdtsc` and `cpuid`.
//! Neither touches memory. On other architectures the module says that there is no such counter.
#![allow(unsafe_code)]

/// CPUID leaf with the power-management features (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, E.4).
#[cfg(target_arch = "x86_64")]
const LEAF_POWER: u32 = 0x8000_0007;
/// EDX bit of that leaf: the counter runs at a constant rate in all power states.
#[cfg(target_arch = "x86_64")]
const INVARIANT_TSC: u32 = 1 << 8;
/// The kernel drops `tsc` from this list when it sees the counters of two CPUs drift apart.
#[cfg(target_arch = "x86_64")]
const CLOCK_SOURCES: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";

/// Whether the counter ticks at one rate, in every power state, in step on all CPUs.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_invariant() -> bool {
    let stable = std::fs::read_to_string(CLOCK_SOURCES)
        .map_or(true, |sources| sources.split_whitespace().any(|source| source == "tsc"));
    stable && cpu_promises_invariance()
}

#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe, reason = "`__cpuid` is a safe function in newer compilers")]
fn cpu_promises_invariance() -> bool {
    use std::arch::x86_64::__cpuid;
    // SAFETY: every x86-64 processor has `cpuid`, and leaf 0x8000_0000 says which extended leaves exist.
    unsafe { __cpuid(0x8000_0000).eax >= LEAF_POWER && __cpuid(LEAF_POWER).edx & INVARIANT_TSC != 0 }
}

/// The counter now. Not ordered with the loads and stores around it: it may be tens of cycles early or late.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn read() -> u64 {
    // SAFETY: every x86-64 processor has `rdtsc`, and Linux leaves it enabled for user space.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn is_invariant() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn read() -> u64 {
    0
}
