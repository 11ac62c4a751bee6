//! What the environment says about how this rank is reached, in our words and in NCCL's and Gloo's:
//! trainers that were written for those set theirs.

use crate::ReduceError;
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One address of one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    interface: String,
    ip: IpAddr,
    up: bool,
}

/// The address in `FIREFLY_BIND_ADDR`, else the first one of the interfaces that
/// `FIREFLY_SOCKET_IFNAME`, `NCCL_SOCKET_IFNAME` or `GLOO_SOCKET_IFNAME` names, in this order; `None`
/// if none is set.
pub fn bind_address_from_env() -> Result<Option<String>, ReduceError> {
    let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    if let Some(address) = set("FIREFLY_BIND_ADDR") {
        return Ok(Some(address));
    }
    let v4 = set("NCCL_SOCKET_FAMILY").as_deref() == Some("AF_INET");
    let v6 = set("NCCL_SOCKET_FAMILY").as_deref() == Some("AF_INET6");
    for name in ["FIREFLY_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"] {
        let Some(pattern) = set(name) else { continue };
        let addresses = addresses()?;
        let family = |a: &&Address| (!v4 || a.ip.is_ipv4()) && (!v6 || a.ip.is_ipv6());
        return match choose(&pattern, addresses.iter().filter(family)) {
            Some(address) => Ok(Some(address.ip.to_string())),
            None => {
                let mut there: Vec<String> =
                    addresses.iter().map(|a| format!("{} ({})", a.interface, a.ip)).collect();
                there.dedup();
                Err(ReduceError::invalid(format!(
                    "{name}={pattern} names no interface that is up and has an address; there are {}",
                    there.join(", ")
                )))
            }
        };
    }
    Ok(None)
}

/// The node key where `NCCL_SHM_DISABLE=1` forbids shared memory: one for each rank.
pub fn node_key_from_env(rank: u32) -> Option<String> {
    let disabled = std::env::var("NCCL_SHM_DISABLE").is_ok_and(|v| v == "1");
    disabled.then(|| format!("{}/rank {rank}", crate::bootstrap::default_node_key()))
}

/// As NCCL reads it: a list of prefixes, `=` before it for whole names, `^` for all but these.
fn choose<'a>(pattern: &str, addresses: impl Iterator<Item = &'a Address>) -> Option<&'a Address> {
    let (excluded, rest) = pattern.strip_prefix('^').map_or((false, pattern), |rest| (true, rest));
    let (whole, rest) = rest.strip_prefix('=').map_or((false, rest), |rest| (true, rest));
    let names: Vec<&str> = rest.split(',').filter(|n| !n.is_empty()).collect();
    let matches = |interface: &str, name: &str| {
        // NCCL also takes "name:port".
        let name = name.split(':').next().unwrap_or(name);
        if whole { interface == name } else { interface.starts_with(name) }
    };
    let up: Vec<&Address> = addresses.filter(|a| a.up).collect();
    if excluded {
        return up
            .into_iter()
            .find(|a| !names.iter().any(|n| matches(&a.interface, n)) && !a.ip.is_loopback());
    }
    // The order of the list is an order of preference.
    names.iter().find_map(|name| up.iter().find(|a| matches(&a.interface, name)).copied())
}

/// All addresses of this machine, IPv4 before IPv6 of the same interface, link-local ones left out.
fn addresses() -> Result<Vec<Address>, ReduceError> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the list is written by the call and freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(ReduceError::system("getifaddrs", std::io::Error::last_os_error()));
    }
    let mut found = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an entry of the list that getifaddrs made.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        if entry.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: every socket address begins with its family.
        let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
        let ip = match family {
            libc::AF_INET => {
                // SAFETY: the family says that it is one of these.
                let address = unsafe { *entry.ifa_addr.cast::<libc::sockaddr_in>() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)))
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let address = unsafe { *entry.ifa_addr.cast::<libc::sockaddr_in6>() };
                IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr))
            }
            _ => continue,
        };
        if matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            continue; // needs a scope to be reached
        }
        // SAFETY: a C string that lives as long as the list.
        let interface = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        found.push(Address { interface, ip, up: entry.ifa_flags & libc::IFF_UP as u32 != 0 });
    }
    // SAFETY: made by getifaddrs, freed once, not used after.
    unsafe { libc::freeifaddrs(list) };
    found.sort_by_key(|a| a.ip.is_ipv6());
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_chosen_as_nccl_does() {
        let address = |interface: &str, ip: &str, up| Address {
            interface: interface.into(),
            ip: ip.parse().unwrap(),
            up,
        };
        let all = [
            address("lo", "127.0.0.1", true),
            address("eth0", "10.0.0.1", true),
            address("eth1", "10.1.0.1", false),
            address("eth10", "10.2.0.1", true),
            address("ib0", "10.3.0.1", true),
        ];
        let chosen = |pattern| choose(pattern, all.iter()).map(|a| a.interface.as_str());
        assert_eq!(chosen("eth"), Some("eth0"));
        assert_eq!(chosen("eth1"), Some("eth10"), "a prefix, and eth1 is down");
        assert_eq!(chosen("=eth1"), None);
        assert_eq!(chosen("=ib0,eth0"), Some("ib0"));
        assert_eq!(chosen("ib,eth:9000"), Some("ib0"));
        assert_eq!(chosen("^eth"), Some("ib0"), "the loopback is nobody's first choice");
        assert_eq!(chosen("^=eth0"), Some("eth10"));
        assert_eq!(chosen("lo"), Some("lo"));
        assert_eq!(chosen("wlan"), None);
    }

    #[test]
    fn this_machine_has_a_loopback() {
        assert!(addresses().unwrap().iter().any(|a| a.ip.is_loopback()));
    }
}
