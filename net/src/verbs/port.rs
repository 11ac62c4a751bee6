//! A device's ports and by which addresses (GIDs) they are reached, from verbs and sysfs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// What the cable speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkLayer {
    /// InfiniBand: addressed by LID within a subnet.
    InfiniBand,
    /// Ethernet (RoCE): addressed by GID, which is an IP address.
    Ethernet,
}

impl LinkLayer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            LinkLayer::InfiniBand => "infiniband",
            LinkLayer::Ethernet => "ethernet",
        }
    }
}

/// How packets to a GID are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GidKind {
    /// RoCE v2: UDP over IP; routable.
    RoceV2,
    /// RoCE v1 or InfiniBand.
    Ib,
}

impl GidKind {
    /// As sysfs spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            GidKind::RoceV2 => "RoCE v2",
            GidKind::Ib => "IB/RoCE v1",
        }
    }
}

/// One address of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gid {
    pub(crate) raw: [u8; 16],
    pub(crate) index: u8,
    pub(crate) kind: GidKind,
}

impl Gid {
    /// The IP address that a RoCE GID is; InfiniBand's are none.
    pub(crate) fn address(&self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.raw);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    fn is_link_local(&self) -> bool {
        self.raw[0] == 0xFE && self.raw[1] & 0xC0 == 0x80
    }

    /// How good an address it is on Ethernet; lower is better. IPv4 routes everywhere and is what
    /// operators configure; a link-local address reaches one segment only.
    fn rank(&self) -> u8 {
        match (self.kind, self.address()) {
            (GidKind::RoceV2, IpAddr::V4(_)) => 0,
            (GidKind::RoceV2, IpAddr::V6(_)) if !self.is_link_local() => 1,
            (GidKind::RoceV2, IpAddr::V6(_)) => 2,
            (GidKind::Ib, _) => 3,
        }
    }
}

/// A port that can be used, as it was when looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) number: u8,
    pub(crate) link: LinkLayer,
    /// As `ibv_mtu`: 1 is 256 bytes, each step doubles.
    pub(crate) mtu: u32,
    /// InfiniBand's local address.
    pub(crate) lid: u16,
    /// The address that queue pairs use.
    pub(crate) gid: Gid,
    /// All addresses, the best first.
    pub(crate) gids: Vec<Gid>,
    /// The network interface of a RoCE port.
    pub(crate) netdev: Option<String>,
}

impl Port {
    /// Bytes of the largest packet.
    pub(crate) fn mtu_bytes(&self) -> u32 {
        128 << self.mtu.min(6)
    }

    /// The same port, with the address `ip` if it has that one.
    pub(crate) fn at(&self, ip: IpAddr) -> Port {
        let mut port = self.clone();
        let ip = ip.to_canonical();
        if let Some(gid) = self.gids.iter().find(|g| g.kind == GidKind::RoceV2 && g.address() == ip) {
            port.gid = *gid;
        }
        port
    }
}

impl Port {
    /// The same port, with the address that suits a peer at `gid` who has dialled `ip`: that very
    /// address if it is this port's, else one of the peer's network, else the first.
    pub(crate) fn toward(&self, gid: &[u8; 16], ip: IpAddr) -> Port {
        let mut port = self.at(ip);
        if port.gid.address() != ip.to_canonical()
            && let Some(near) = self.gids.iter().find(|g| same_network(&g.raw, gid))
        {
            port.gid = *near;
        }
        port
    }
}

/// Orders the addresses of a port, the one to use first.
pub(crate) fn sort_gids(link: LinkLayer, mut gids: Vec<Gid>) -> Vec<Gid> {
    gids.retain(|g| g.raw != [0; 16]);
    match link {
        // Index 0 is the port's own; the others are aliases.
        LinkLayer::InfiniBand => gids.sort_by_key(|g| g.index),
        LinkLayer::Ethernet => gids.sort_by_key(|g| (g.rank(), g.index)),
    }
    gids
}

/// Folder of a port in sysfs.
pub(crate) fn folder(device: &str, port: u8) -> std::path::PathBuf {
    Path::new("/sys/class/infiniband").join(device).join("ports").join(port.to_string())
}

/// How the GID at `index` is framed, and its network interface.
pub(crate) fn gid_attributes(folder: &Path, index: u8) -> (GidKind, Option<String>) {
    let read = |what: &str| std::fs::read_to_string(folder.join(format!("gid_attrs/{what}/{index}"))).ok();
    let kind = match read("types") {
        Some(text) if text.trim() == GidKind::RoceV2.name() => GidKind::RoceV2,
        _ => GidKind::Ib,
    };
    (kind, read("ndevs").map(|text| text.trim().to_owned()).filter(|name| !name.is_empty()))
}

/// Whether `a` and `b` can be expected to reach each other without knowing the network's routes:
/// the same InfiniBand subnet, or IP networks of the usual size (24 bits of IPv4, 64 of IPv6).
pub(crate) fn same_network(a: &[u8; 16], b: &[u8; 16]) -> bool {
    let v4 = |raw: &[u8; 16]| Ipv6Addr::from(*raw).to_ipv4_mapped();
    match (v4(a), v4(b)) {
        (Some(a), Some(b)) => network_of(a) == network_of(b),
        (None, None) => a[..8] == b[..8],
        _ => false,
    }
}

fn network_of(address: Ipv4Addr) -> u32 {
    address.to_bits() >> 8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(text: &str, index: u8, kind: GidKind) -> Gid {
        let raw = match text.parse::<IpAddr>().unwrap() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        Gid { raw, index, kind }
    }

    #[test]
    fn the_most_routable_address_comes_first() {
        use GidKind::{Ib, RoceV2};
        let all = vec![
            gid("fe80::1", 0, Ib),
            gid("fe80::1", 1, RoceV2),
            gid("2001:db8::1", 2, RoceV2),
            gid("10.1.0.1", 3, Ib),
            gid("10.1.0.1", 4, RoceV2),
            gid("10.1.0.3", 5, RoceV2),
            gid("::", 6, RoceV2),
        ];
        let order = |link| sort_gids(link, all.clone()).iter().map(|g| g.index).collect::<Vec<_>>();
        assert_eq!(order(LinkLayer::Ethernet), [4, 5, 2, 1, 0, 3]);
        assert_eq!(order(LinkLayer::InfiniBand), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_port_takes_the_address_that_it_is_asked_for_if_it_has_it() {
        let gids = vec![gid("10.1.0.1", 1, GidKind::RoceV2), gid("10.1.0.3", 2, GidKind::RoceV2)];
        let port =
            Port { number: 1, link: LinkLayer::Ethernet, mtu: 5, lid: 0, gid: gids[0], gids, netdev: None };
        assert_eq!(port.at("10.1.0.3".parse().unwrap()).gid.index, 2);
        assert_eq!(port.at("::ffff:10.1.0.3".parse().unwrap()).gid.index, 2);
        assert_eq!(port.at("10.9.0.3".parse().unwrap()).gid.index, 1);
        assert_eq!(port.mtu_bytes(), 4096);
    }

    #[test]
    fn networks_are_told_apart() {
        let raw = |text| gid(text, 0, GidKind::RoceV2).raw;
        for (a, b, same) in [
            ("10.1.0.1", "10.1.0.254", true),
            ("10.1.0.1", "10.1.1.1", false),
            ("fe80::1", "fe80::2", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("10.1.0.1", "fe80::1", false),
        ] {
            assert_eq!(same_network(&raw(a), &raw(b)), same, "{a} {b}");
        }
    }
}
