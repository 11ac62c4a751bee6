use super::*;

fn options(devices: &[&str]) -> NetOptions {
    NetOptions { devices: devices.iter().map(|d| (*d).to_owned()).collect(), ..NetOptions::default() }
}

#[test]
fn the_environment_overrides_and_bad_values_are_errors() {
    let base = NetOptions { transport: Transport::Rdma, ..options(&["mlx5_0"]) };
    let same = base.clone().overridden_by(None, None).unwrap();
    assert_eq!(same, base);
    let other = base.clone().overridden_by(Some("tcp".into()), Some("rxe0, rxe1:2".into())).unwrap();
    assert_eq!((other.transport, other.devices), (Transport::Tcp, vec!["rxe0".into(), "rxe1:2".into()]));
    for bad in ["", "TCP", "tcp ", "verbs"] {
        let error = base.clone().overridden_by(Some(bad.into()), None).unwrap_err();
        assert_eq!(error, FabricError::Transport(bad.into()));
        assert!(error.to_string().contains("FIREFLY_TRANSPORT"), "{error}");
    }
    // Names that cannot be a device's, whatever the machine has; an empty variable is one of them.
    let empty = NetOptions::default().overridden_by(None, Some(String::new())).unwrap();
    for bad in [empty, options(&["mlx5_0:"]), options(&["a:0"]), options(&["m*x"]), options(&["a b"])] {
        let error = Fabric::open(bad.clone()).unwrap_err();
        assert_eq!(error, FabricError::DeviceName(bad.devices[0].clone()), "{bad:?}");
        let tcp = NetOptions { transport: Transport::Tcp, ..bad };
        assert!(Fabric::open(tcp).is_err(), "not ignored either when no device is opened");
    }
    let class = Class { service_level: 16, traffic_class: 0 };
    let error = Fabric::open(NetOptions { storage: class, ..NetOptions::default() }).unwrap_err();
    assert_eq!(error, FabricError::ServiceLevel(16));
}

#[test]
fn names_prefixes_and_ports_choose_devices() {
    let takes = |text: &str, device: &str, port| Wanted::parse(text).unwrap().takes(device, port);
    assert!(takes("mlx5_0", "mlx5_0", 1) && takes("mlx5_0", "mlx5_0", 2));
    assert!(!takes("mlx5_1", "mlx5_10", 1));
    assert!(takes("mlx5_1*", "mlx5_10", 1) && takes("*", "rxe0", 1));
    assert!(takes("mlx5_0:2", "mlx5_0", 2) && !takes("mlx5_0:2", "mlx5_0", 1));
}

#[test]
fn a_device_that_was_named_must_exist_and_a_prefix_need_not() {
    let names = ["rxe0".to_owned()];
    let wanted = |text| [Wanted::parse(text).unwrap()];
    let error = find_rails(&wanted("mlx5_0"), &names, false).err().unwrap();
    assert_eq!(error, FabricError::NoSuchDevice { name: "mlx5_0".into(), found: "rxe0".into() });
    let (rails, why) = find_rails(&wanted("mlx5_*"), &names, false).unwrap();
    assert!(rails.is_empty() && why.unwrap().contains("no RDMA device matches; this machine has: rxe0"));
    let (_, why) = find_rails(&[], &[], false).unwrap();
    assert_eq!(why.as_deref(), Some("no RDMA device"));
}

#[test]
fn the_report_says_why_not_in_words() {
    let report = Fabric::tcp().report();
    assert_eq!(report.why_not.as_deref(), Some("TCP was asked for"));
    assert!(report.rails.is_empty());
    // Whatever this machine has, either rails that are up or a reason.
    let fabric = Fabric::open(NetOptions::default()).unwrap();
    let report = fabric.report();
    println!("{report:?}");
    assert_ne!(report.why_not.is_some(), report.rails.iter().any(|r| r.up));
    assert!(fabric.invalid().is_none());
}
