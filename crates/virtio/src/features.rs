//! Feature bits that belong to the ring or the transport, not to one device type (virtio 1.2, section 6).

/// The driver may use indirect descriptor tables.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say by index when they next want to be notified, instead of on or off.
pub const EVENT_IDX: u64 = 1 << 29;
/// virtio 1.x rather than the legacy interface.
pub const VERSION_1: u64 = 1 << 32;
/// The device reaches memory through an IOMMU of the platform.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// The packed ring format.
pub const RING_PACKED: u64 = 1 << 34;
/// The device uses buffers in the order in which they were made available.
pub const IN_ORDER: u64 = 1 << 35;
/// The driver passes extra data with a notification.
pub const NOTIFICATION_DATA: u64 = 1 << 38;
/// Single queues can be reset.
pub const RING_RESET: u64 = 1 << 40;

/// The ring features that this crate implements.
pub const RING_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | IN_ORDER;
