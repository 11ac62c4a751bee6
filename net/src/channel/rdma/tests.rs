//! Run inside the virtual machine of `tests/rdma-vm`, which has two Soft-RoCE devices on a veth
//! pair. `FIREFLY_RDMA_DEVICES` names two devices that reach each other, such as "rxe0,rxe1".

use super::super::contract::{LONG, Pair, Rank, channel_contract, header};
use super::super::*;
use crate::fabric::{NetOptions, Transport};
use firefly_types::ClusterSecret;
use std::time::Instant;

/// Each side has one device, so that packets cross the wire.
fn sides() -> (Fabric, Fabric) {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").expect("FIREFLY_RDMA_DEVICES names two devices");
    let (a, b) = names.split_once(',').expect("two names with a comma between");
    let open = |name: &str| {
        let options = NetOptions {
            transport: Transport::Rdma,
            devices: vec![name.to_owned()],
            ..NetOptions::default()
        };
        Fabric::open(options).unwrap()
    };
    (open(a), open(b))
}

fn secret() -> ClusterSecret {
    ClusterSecret::from_bytes([1; 32])
}

fn soon() -> Instant {
    Instant::now() + LONG
}

fn options(fabric: &Fabric) -> ChannelOptions {
    ChannelOptions { fabric: fabric.clone(), sockets: 1 }
}

type Made = Result<Box<dyn Channel>, ChannelError>;

fn try_pair((dialler, acceptor): (&Fabric, &Fabric)) -> (Made, Made) {
    let listener = ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = listener.local_addr();
    let dialler = options(dialler);
    let dialled = std::thread::spawn(move || connect_channel(addr, &secret(), [42; 32], soon(), &dialler));
    let accepted = listener.accept(&secret(), soon(), &options(acceptor)).map(|(channel, _)| channel);
    (dialled.join().unwrap(), accepted)
}

fn pair(sides: &(Fabric, Fabric)) -> Pair {
    let (left, right) = try_pair((&sides.0, &sides.1));
    let (left, right) = (left.unwrap(), right.unwrap());
    assert_eq!((left.transport(), right.transport()), ("rdma", "rdma"));
    assert_eq!(left.why_not_rdma(), None);
    (left, right)
}

/// One fabric of both devices, for regions that both sides find.
fn both() -> Fabric {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").unwrap();
    let devices = names.split(',').map(str::to_owned).collect();
    Fabric::open(NetOptions { transport: Transport::Rdma, devices, ..NetOptions::default() }).unwrap()
}

#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
fn verbs_keep_the_channel_contract() {
    let fabric = both();
    channel_contract(&fabric, &|| pair(&(fabric.clone(), fabric.clone())));
}

/// The documented price of one message of 1 MiB between regions.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
fn verbs_move_a_mebibyte_between_regions_without_a_copy() {
    let fabric = both();
    let (mut left, mut right) = pair(&(fabric.clone(), fabric.clone()));
    const MIB: usize = 1 << 20;
    let (from, mut to) = (vec![3u8; MIB], vec![0u8; MIB]);
    // SAFETY: dropped before the memory, at the end.
    let regions = unsafe {
        [
            Region::register(&fabric, from.as_ptr().cast_mut(), MIB).unwrap(),
            Region::register(&fabric, to.as_mut_ptr(), MIB).unwrap(),
        ]
    };
    let mut once = |n: u64| {
        let mut done = (Vec::new(), Vec::new());
        // SAFETY: both memories outlive the channels.
        unsafe { left.post_send(n, &header(n), from.as_ptr(), MIB).unwrap() };
        while done.0.is_empty() || done.1.is_empty() {
            left.progress(&mut done.0).unwrap();
            right.progress(&mut done.1).unwrap();
            if let Some(next) = right.peek().unwrap() {
                // SAFETY: as above.
                unsafe { right.post_recv(n, to.as_mut_ptr(), next.len).unwrap() };
            }
        }
        (left.counters(), right.counters())
    };
    let (left_before, right_before) = once(0);
    let (left_after, right_after) = once(1);
    println!("left {left_after:?}\nright {right_after:?}");
    // Sender: the header into the ring, the payload. Receiver: "write it here". Credit may go back
    // at any time.
    assert_eq!(left_after.operations - left_before.operations, 2);
    assert!((1..=2).contains(&(right_after.operations - right_before.operations)));
    assert_eq!((left_after.bytes_copied, right_after.bytes_copied), (0, 0));
    assert_eq!(left_after.registrations, left_before.registrations);
    drop((left, right, regions));
    assert!(to == from);
}

/// A region that is gone cannot be written any more, although the peer has its key.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
fn verbs_refuse_the_key_of_a_region_that_is_gone() {
    let fabric = both();
    for stale in [true, false] {
        let (left, mut right) = pair(&(fabric.clone(), fabric.clone()));
        let mut left = Rank::new(left, vec![vec![7; 1 << 20]]);
        let next = loop {
            left.step().unwrap();
            right.progress(&mut Vec::new()).unwrap();
            if let Some(next) = right.peek().unwrap() {
                break next;
            }
        };
        let mut memory = vec![0u8; next.len];
        // SAFETY: dropped before the memory.
        let region = unsafe { Region::register(&fabric, memory.as_mut_ptr(), next.len) }.unwrap();
        // SAFETY: the memory outlives the channel.
        unsafe { right.post_recv(0, memory.as_mut_ptr(), next.len).unwrap() };
        // The key is on its way.
        right.progress(&mut Vec::new()).unwrap();
        if stale {
            drop(region);
            let error = left.until_error();
            println!("{error}");
            let text = error.to_string();
            assert!(
                matches!(error, ChannelError::Device { .. }) && text.contains("refused access"),
                "{text}"
            );
            assert!(memory.iter().all(|b| *b == 0));
        } else {
            // The control: with the region it lands.
            let mut done = Vec::new();
            while done.is_empty() {
                left.step().unwrap();
                right.progress(&mut done).unwrap();
            }
            drop(region);
            assert!(memory.iter().all(|b| *b == 7));
        }
    }
}

/// Who has a device and wants it gets it; who has none says so.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
fn verbs_are_chosen_by_policy_and_devices() {
    let (a, b) = sides();
    let (left, right) = pair(&(a.clone(), b.clone()));
    drop((left, right));
    let tcp = Fabric::tcp();
    for fabrics in [(&a, &tcp), (&tcp, &b)] {
        let (left, right) = try_pair(fabrics);
        for error in [left.err().unwrap(), right.err().unwrap()] {
            let text = error.to_string();
            assert!(
                matches!(error, ChannelError::NoRdma { .. }) && text.contains("TCP was asked for"),
                "{text}"
            );
        }
    }
    let auto = |fabric: &Fabric| {
        let options = NetOptions { transport: Transport::Auto, ..fabric.options().clone() };
        Fabric::open(options).unwrap()
    };
    // By loopback, TCP unless RDMA is demanded.
    let (left, _right) = try_pair((&auto(&a), &auto(&b)));
    let left = left.unwrap();
    assert_eq!((left.transport(), left.why_not_rdma()), ("tcp", Some("the peer is reached by loopback")));
    let (left, _right) = try_pair((&auto(&a), &tcp));
    assert_eq!(left.unwrap().why_not_rdma(), Some("here: TCP was asked for"));
}

/// Devices that are up and do not reach each other: the connection is made by TCP and says why; once
/// packets get through, it is RDMA again.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
fn verbs_fall_back_to_tcp_when_no_probe_gets_through() {
    let devices = sides();
    let auto = |fabric: &Fabric| {
        let options = NetOptions { transport: Transport::Auto, ..fabric.options().clone() };
        Fabric::open(options).unwrap()
    };
    let (a, b) = (auto(&devices.0), auto(&devices.1));
    // Not loopback's, so that RDMA is tried; within this machine TCP does not take the veth pair.
    let address = b.report().rails[0].address.unwrap();
    let made = |a: &Fabric, b: &Fabric| {
        let listener = ChannelListener::bind((address, 0).into()).unwrap();
        let (addr, dialler) = (listener.local_addr(), options(a));
        let dialled = std::thread::spawn(move || connect_channel(addr, &secret(), [0; 32], soon(), &dialler));
        let accepted = listener.accept(&secret(), soon(), &options(b)).map(|(channel, _)| channel);
        (dialled.join().unwrap(), accepted)
    };
    let tc = std::env::var("TC").unwrap_or_else(|_| "tc".into());
    let lose = |what: &str| {
        for device in ["d0", "d1"] {
            let rule = format!("qdisc {what} dev {device} root netem loss 100%");
            let status = std::process::Command::new(&tc).args(rule.split(' ')).status().unwrap();
            assert!(status.success(), "{rule}");
        }
    };
    lose("add");
    let (left, right) = made(&a, &b);
    // RDMA that is demanded fails, on both sides.
    let (refused_left, refused_right) = made(&devices.0, &b);
    lose("del");
    for channel in [left.unwrap(), right.unwrap()] {
        println!("{:?}", channel.why_not_rdma());
        assert_eq!(channel.transport(), "tcp");
        assert!(channel.why_not_rdma().unwrap().contains("a message each way over the queue pairs"));
    }
    for error in [refused_left.err().unwrap(), refused_right.err().unwrap()] {
        assert!(matches!(error, ChannelError::NoRdma { .. }), "{error}");
    }
    let (left, right) = made(&a, &b);
    assert_eq!((left.unwrap().transport(), right.unwrap().transport()), ("rdma", "rdma"));
}
