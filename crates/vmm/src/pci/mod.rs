//! PCI as the guest sees it: configuration space, BARs, MSI-X, and virtio devices behind them.
