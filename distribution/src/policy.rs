//! Where a connection may go.
//!
//! The operator chose the hosts of a registry. Where a host sends the client on to (redirects, token services, places
//! to upload to) it chose itself, and might choose what only this machine can reach: the metadata service of a cloud
//! at 169.254.169.254, a daemon that listens on a loopback address. So an address that a host named
//!
//! - is never link-local, multicast, unspecified or the metadata service;
//! - is a loopback address only if the host itself was reached by one;
//! - is not spelled out as a private address (RFC 1918, RFC 4193) unless the host was reached by one. A *name* may have
//!   a private address: storage services have such inside the networks of clouds (split DNS), and the connection is
//!   encrypted then, so that whoever answers has a certificate for the name;
//! - is encrypted if the host was reached so.
//!
//! With a proxy the client looks up no names; only addresses that are spelled out are checked then.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What is known of who named the place to connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Policy {
    /// The operator did.
    Configured,
    /// A host did, which was itself reached at a loopback or private address, or neither.
    Named {
        /// A loopback address.
        by_loopback: bool,
        /// A private or a loopback address.
        by_private: bool,
    },
}

impl Policy {
    /// What a host may name that was reached at an address, if that is known.
    pub(crate) fn named_by(address: Option<IpAddr>) -> Policy {
        let address = address.map(embedded);
        let by_loopback = address.is_some_and(|address| address.is_loopback());
        Policy::Named { by_loopback, by_private: by_loopback || address.is_some_and(is_private) }
    }

    /// Whether a connection to an address is allowed; `literal` if the address was spelled out.
    pub(crate) fn allows(self, address: IpAddr, literal: bool) -> bool {
        let Policy::Named { by_loopback, by_private } = self else { return true };
        let address = embedded(address);
        if address.is_loopback() {
            return by_loopback;
        }
        !is_never_named(address) && (!literal || by_private || !is_private(address))
    }
}

/// The IPv4 address within an IPv6 one, if it is of a kind that reaches it (RFC 4291, RFC 6052).
fn embedded(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(six) if six.octets().starts_with(&[0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0]) => {
            let [.., a, b, c, d] = six.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        address => address.to_canonical(),
    }
}

fn is_never_named(address: IpAddr) -> bool {
    /// Amazon's metadata service.
    const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match address {
        // All of 0.0.0.0/8 is "this network"; 100.100.100.200 is the metadata service of Alibaba's cloud.
        IpAddr::V4(four) => {
            four.octets()[0] == 0
                || four.is_link_local()
                || four.is_multicast()
                || four.is_broadcast()
                || four.octets() == [100, 100, 100, 200]
        }
        IpAddr::V6(six) => {
            six.is_unspecified() || six.is_unicast_link_local() || six.is_multicast() || six == METADATA
        }
    }
}

fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(four) => {
            // And the addresses of carriers' networks, RFC 6598.
            four.is_private() || (four.octets()[0] == 100 && four.octets()[1] & 0xc0 == 64)
        }
        IpAddr::V6(six) => six.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(by: &str, address: &str, literal: bool) -> bool {
        Policy::named_by(by.parse().ok()).allows(address.parse().unwrap(), literal)
    }

    #[test]
    fn a_public_host_names_public_places() {
        for address in ["1.1.1.1", "2606:4700::1111"] {
            assert!(allows("8.8.8.8", address, true) && allows("", address, true), "{address}");
        }
        let never = [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fe80::1",
            "fd00:ec2::254",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "100.100.100.200",
        ];
        for address in never {
            for by in ["8.8.8.8", "", "10.0.0.1", "127.0.0.1"] {
                assert!(!allows(by, address, false) && !allows(by, address, true), "{by} {address}");
            }
            assert!(Policy::Configured.allows(address.parse().unwrap(), true));
        }
    }

    #[test]
    fn loopback_and_private_are_for_their_own_kind() {
        for address in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert!(!allows("8.8.8.8", address, false) && !allows("10.0.0.1", address, false));
            assert!(allows("127.0.0.1", address, true) && allows("::1", address, true));
        }
        for address in ["10.1.2.3", "192.168.1.1", "172.16.0.1", "fd12::1", "100.64.0.1"] {
            assert!(allows("8.8.8.8", address, false), "{address}: names may be private");
            assert!(!allows("8.8.8.8", address, true), "{address}");
            assert!(allows("10.0.0.1", address, true) && allows("127.0.0.1", address, true), "{address}");
        }
    }
}
