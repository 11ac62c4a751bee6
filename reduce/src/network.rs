//! How ranks on other nodes are reached, as the environment describes it.
//!
//! | variable | what |
//! | --- | --- |
//! | `FIREFLY_TRANSPORT`, `FIREFLY_RDMA_DEVICES` | see `firefly_net`; they win over NCCL's |
//! | `FIREFLY_SOCKETS` | TCP connections between two ranks, 1 to 16; default 1 |
//! | `NCCL_IB_DISABLE` | 1: TCP |
//! | `NCCL_IB_HCA` | devices, as NCCL reads it: prefixes; `=` in front: whole names; `^`: all others |
//! | `NCCL_IB_SL`, `NCCL_IB_TC` | service level (0 to 15) and traffic class (0 to 255) of packets |
//!
//! NCCL's variables count only if nothing has opened the process's network before: in a trainer,
//! reduce is the first. Where they come too late, that is said.

use crate::ReduceError;
use crate::comm::Config;
use firefly_net::{ChannelOptions, Fabric, FabricError, MOST_SOCKETS, NetOptions, Transport};
use std::sync::OnceLock;

/// What NCCL's variables say about the network; `None` if there are none.
fn from_nccl(
    variable: &dyn Fn(&str) -> Option<String>,
    devices: &dyn Fn() -> Vec<String>,
) -> Result<Option<NetOptions>, ReduceError> {
    let mut options = NetOptions::default();
    let mut any = false;
    let mut number = |name: &str, most: u32| -> Result<Option<u32>, ReduceError> {
        let Some(text) = variable(name) else { return Ok(None) };
        any = true;
        match text.trim().parse::<u32>() {
            Ok(n) if n <= most => Ok(Some(n)),
            _ => {
                Err(ReduceError::invalid(format!("{name} must be a number of at most {most}, not {text:?}")))
            }
        }
    };
    if number("NCCL_IB_DISABLE", u32::MAX)?.is_some_and(|n| n != 0) {
        options.transport = Transport::Tcp;
    }
    if let Some(level) = number("NCCL_IB_SL", 15)? {
        options.collective.service_level = level as u8;
    }
    if let Some(class) = number("NCCL_IB_TC", 255)? {
        options.collective.traffic_class = class as u8;
    }
    if let Some(text) = variable("NCCL_IB_HCA") {
        any = true;
        let text = text.trim();
        let (others, text) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let (whole, text) = text.strip_prefix('=').map_or((false, text), |rest| (true, rest));
        let names: Vec<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        let split = |name: &str| match name.split_once(':') {
            Some((name, port)) => (name.to_owned(), Some(port.to_owned())),
            None => (name.to_owned(), None),
        };
        if others {
            let excluded = |device: &String| {
                names.iter().map(|n| split(n).0).any(|n| match whole {
                    true => *device == n,
                    false => device.starts_with(&n),
                })
            };
            options.devices = devices().into_iter().filter(|device| !excluded(device)).collect();
            if options.devices.is_empty() {
                options.transport = Transport::Tcp;
            }
        } else {
            options.devices = names
                .into_iter()
                .map(|name| {
                    let (name, port) = split(name);
                    let prefix = if whole { "" } else { "*" };
                    port.map_or_else(|| format!("{name}{prefix}"), |port| format!("{name}{prefix}:{port}"))
                })
                .collect();
        }
    }
    Ok(any.then_some(options))
}

fn sockets(variable: &dyn Fn(&str) -> Option<String>) -> Result<usize, ReduceError> {
    let Some(text) = variable("FIREFLY_SOCKETS") else { return Ok(1) };
    text.trim().parse().ok().filter(|n| (1..=MOST_SOCKETS).contains(n)).ok_or_else(|| {
        ReduceError::invalid(format!(
            "FIREFLY_SOCKETS must be a number from 1 to {MOST_SOCKETS}, not {text:?}"
        ))
    })
}

/// RDMA devices of this machine, by name.
fn devices() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Opens the process's network by NCCL's variables, once.
fn install() -> Result<(), ReduceError> {
    static INSTALLED: OnceLock<Result<(), ReduceError>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let Some(options) = from_nccl(&variable, &devices)? else { return Ok(()) };
            match Fabric::install(options) {
                Ok(()) => Ok(()),
                Err(FabricError::InUse) => {
                    tracing::warn!("NCCL_IB_* have no effect: the process's network was in use before");
                    Ok(())
                }
                Err(error) => Err(ReduceError::invalid(format!("the environment's NCCL_IB_*: {error}"))),
            }
        })
        .clone()
}

/// How the ranks of a group with `config` reach each other.
pub(crate) fn options(config: &Config) -> Result<ChannelOptions, ReduceError> {
    if let Some(options) = &config.channels {
        return Ok(options.clone());
    }
    install()?;
    Ok(ChannelOptions { fabric: Fabric::shared(), sockets: sockets(&variable)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nccl(set: &[(&str, &str)]) -> Result<Option<NetOptions>, ReduceError> {
        let variable = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        from_nccl(&variable, &|| ["mlx5_0", "mlx5_1", "rxe0"].map(str::to_owned).to_vec())
    }

    fn devices_of(hca: &str) -> Vec<String> {
        nccl(&[("NCCL_IB_HCA", hca)]).unwrap().unwrap().devices
    }

    #[test]
    fn nccls_variables_are_honoured() {
        assert_eq!(nccl(&[]).unwrap(), None);
        let off = nccl(&[("NCCL_IB_DISABLE", "1")]).unwrap().unwrap();
        assert_eq!(off.transport, Transport::Tcp);
        assert_eq!(nccl(&[("NCCL_IB_DISABLE", "0")]).unwrap().unwrap().transport, Transport::Auto);
        let marked = nccl(&[("NCCL_IB_SL", "3"), ("NCCL_IB_TC", "106")]).unwrap().unwrap();
        assert_eq!((marked.collective.service_level, marked.collective.traffic_class), (3, 106));
        assert_eq!(devices_of("mlx5"), ["mlx5*"]);
        assert_eq!(devices_of("=mlx5_0, mlx5_1:1"), ["mlx5_0", "mlx5_1:1"]);
        assert_eq!(devices_of("mlx5_1:2"), ["mlx5_1*:2"]);
        assert_eq!(devices_of("^mlx5_1"), ["mlx5_0", "rxe0"]);
        assert_eq!(devices_of("^=mlx5,rxe0"), ["mlx5_0", "mlx5_1"]);
        let none = nccl(&[("NCCL_IB_HCA", "^mlx5,rxe")]).unwrap().unwrap();
        assert_eq!(none.transport, Transport::Tcp);
        for bad in [("NCCL_IB_SL", "16"), ("NCCL_IB_TC", "256"), ("NCCL_IB_DISABLE", "yes")] {
            let error = nccl(&[bad]).unwrap_err().to_string();
            assert!(error.contains(bad.0) && error.contains(bad.1), "{error}");
        }
    }

    #[test]
    fn sockets_are_a_small_number() {
        let of = |value: &'static str| sockets(&move |_| Some(value.into()));
        assert_eq!(sockets(&|_| None).unwrap(), 1);
        assert_eq!(of("4").unwrap(), 4);
        for bad in ["0", "17", "many"] {
            assert!(of(bad).unwrap_err().to_string().contains("FIREFLY_SOCKETS"));
        }
    }
}
