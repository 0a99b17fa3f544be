//! Addresses of this host that nobody else has.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};

/// An address for a server that is to be told where to listen. Every call gives another.
///
/// A port of 127.0.0.1 that was free a moment ago may be taken by whoever connects or listens meanwhile: by every other
/// test. Connections come from 127.0.0.1 and the port lies below those that the kernel chooses, so that the other
/// addresses of the loopback are left alone.
pub fn address() -> SocketAddr {
    static NUMBER: AtomicU8 = AtomicU8::new(0);
    // A pid has 22 bits (proc(5), `pid_max`): 16 of them go into the address, and the others into the port.
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let number = 64 + NUMBER.fetch_add(1, Ordering::Relaxed) % 128;
    SocketAddr::from((Ipv4Addr::new(127, number, middle, low), 20_000 + u16::from(high)))
}
