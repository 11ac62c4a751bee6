use super::*;
use proptest::prelude::*;

fn rail(ip: &str) -> RailInfo {
    let gid = match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    RailInfo { gid, link: LinkLayer::Ethernet }
}

fn wishes(policy: Transport, rails: &[&str]) -> Wishes {
    let why_none = if rails.is_empty() { "no RDMA device".to_owned() } else { String::new() };
    Wishes { policy, sockets: 2, rails: rails.iter().map(|ip| rail(ip)).collect(), why_none }
}

fn endpoint() -> Endpoint {
    let address = Address { qp: 17, psn: 0x12_3456, gid: [7; 16], lid: 3, mtu: 5, reads: 4 };
    Endpoint { address, ring_at: 0x7f00_0000_1000, ring_key: 99, ring: 4096, receives: 64 }
}

fn frames() -> Vec<Frame> {
    let why = String::from("rxe0: port 1 is down");
    vec![
        Frame::Offer { id: [9; 16], wishes: wishes(Transport::Auto, &["10.1.0.1", "fd00::1"]) },
        Frame::Offer { id: [0; 16], wishes: wishes(Transport::Tcp, &[]) },
        Frame::Tcp { sockets: 4, why: why.clone() },
        Frame::Refuse { why: why.clone() },
        Frame::Rdma { sockets: 1, rail: 1, endpoint: endpoint() },
        Frame::Endpoint(endpoint()),
        Frame::Ready,
        Frame::Done,
        Frame::Failed { why },
        Frame::Lane { id: [3; 16], index: 2 },
    ]
}

fn decode(bytes: &[u8]) -> Result<Frame, ChannelError> {
    let len = Frame::body_len([bytes[0], bytes[1]])?;
    assert_eq!(len, bytes.len() - 2);
    Frame::decode(&bytes[2..])
}

#[test]
fn frames_round_trip_and_nothing_shorter_or_longer_is_read() {
    for frame in frames() {
        let bytes = frame.encode();
        assert_eq!(decode(&bytes).unwrap(), frame);
        // A reason may end anywhere; everything else has one length.
        let reason = matches!(
            frame,
            Frame::Offer { .. } | Frame::Tcp { .. } | Frame::Refuse { .. } | Frame::Failed { .. }
        );
        if !reason {
            assert!(Frame::decode(&bytes[2..bytes.len() - 1]).is_err(), "{frame:?}");
            assert!(Frame::decode(&[&bytes[2..], &[0]].concat()).is_err(), "{frame:?}");
        }
    }
    let mut newer = frames()[0].encode();
    newer[3] = 2;
    let error = decode(&newer).unwrap_err().to_string();
    assert!(error.contains("version 2, this side in 1"), "{error}");
    assert!(Frame::body_len([0, 0]).is_err() && Frame::body_len([1, 4]).is_err());
}

#[test]
fn an_impossible_endpoint_is_refused() {
    let spoil: [&dyn Fn(&mut Endpoint); 7] = [
        &|e| e.address.qp = 1 << 24,
        &|e| e.address.mtu = 6,
        &|e| e.address.mtu = 0,
        &|e| e.address.gid = [0; 16],
        &|e| e.ring = 100,
        &|e| e.receives = 1,
        &|e| e.ring_at = u64::MAX - 100,
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        let mut bad = endpoint();
        spoil(&mut bad);
        assert!(decode(&Frame::Endpoint(bad).encode()).is_err(), "{i}");
    }
}

proptest! {
    #[test]
    fn arbitrary_frames_are_refused_or_canonical(
        bytes in prop::collection::vec(any::<u8>(), 1..120),
        from in 0usize..10,
        at in any::<prop::sample::Index>(),
        mutate in any::<bool>(),
    ) {
        let body = if mutate {
            let mut body = frames()[from].encode()[2..].to_vec();
            let at = at.index(body.len());
            body[at] = bytes[0];
            body
        } else {
            bytes
        };
        if let Ok(frame) = Frame::decode(&body) {
            prop_assert_eq!(&frame.encode()[2..], &body[..]);
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn the_carrier_follows_policies_devices_and_addresses() {
    use Transport::{Auto, Rdma, Tcp};
    let far = (ip("10.1.0.2"), ip("10.1.0.1"));
    let near = (ip("127.0.0.1"), ip("127.0.0.1"));
    let a = wishes(Auto, &["10.1.0.1"]);
    let b = wishes(Auto, &["10.1.0.2"]);
    assert_eq!(choose(&a, &b, far, 5), Choice::Rails { theirs: 0, ours: 0 });
    let tcp = |choice: Choice, what: &str| match choice {
        Choice::Tcp { why } => assert!(why.contains(what), "{why}"),
        other => panic!("{what}: {other:?}"),
    };
    tcp(choose(&wishes(Auto, &[]), &b, far, 0), "here: no RDMA device");
    tcp(choose(&a, &wishes(Auto, &[]), far, 0), "there: no RDMA device");
    let asked = Wishes { why_none: "TCP was asked for".into(), ..wishes(Tcp, &["10.1.0.2"]) };
    tcp(choose(&a, &asked, far, 0), "there: TCP was asked for");
    tcp(choose(&a, &b, near, 0), "loopback");
    // Demanded by one side is demanded.
    let demands = Wishes { policy: Rdma, ..b.clone() };
    assert_eq!(choose(&a, &demands, near, 0), Choice::Rails { theirs: 0, ours: 0 });
    assert!(matches!(choose(&wishes(Auto, &[]), &demands, far, 0), Choice::Refuse { .. }));
    assert!(matches!(choose(&a, &wishes(Rdma, &[]), far, 0), Choice::Refuse { .. }));
    let mut infiniband = wishes(Auto, &["fe80::1"]);
    infiniband.rails[0].link = LinkLayer::InfiniBand;
    tcp(choose(&a, &infiniband, far, 0), "InfiniBand");
}

#[test]
fn rails_pair_by_address_then_network_and_spread_over_equals() {
    let ours = wishes(Transport::Auto, &["10.2.0.1", "10.1.0.1", "192.168.0.1"]);
    let theirs = wishes(Transport::Auto, &["10.1.0.2", "10.2.0.2"]);
    // The connection's own addresses.
    let at = (ip("10.1.0.2"), ip("10.1.0.1"));
    assert_eq!(choose(&ours, &theirs, at, 7), Choice::Rails { theirs: 0, ours: 1 });
    // A connection over another network: both pairs of one network, in turn.
    let at = (ip("172.16.0.2"), ip("172.16.0.1"));
    let chosen: Vec<Choice> = (0..4).map(|n| choose(&ours, &theirs, at, n)).collect();
    let pairs = [Choice::Rails { theirs: 0, ours: 1 }, Choice::Rails { theirs: 1, ours: 0 }];
    assert_eq!(chosen, [pairs.clone(), pairs].concat());
    // No network in common: any pair; the probe judges.
    let far = wishes(Transport::Auto, &["10.9.0.1"]);
    assert!(matches!(choose(&ours, &far, at, 0), Choice::Rails { theirs: 0, .. }));
}
