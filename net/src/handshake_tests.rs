use super::*;
use proptest::prelude::*;

fn terms(secret: u8) -> Terms {
    Terms::new(ClusterId(5), &ClusterSecret::from_bytes([secret; 32]), Purpose::Rpc)
}

/// Runs both sides against each other; `tamper` may change each message on its way (0 hello,
/// 1 challenge, 2 proof, 3 verdict).
fn run(
    client: Terms,
    server: Terms,
    mut tamper: impl FnMut(usize, &mut Vec<u8>),
) -> (Result<Agreed, HandshakeError>, Option<Result<Agreed, HandshakeError>>) {
    let (mut c, mut message) = Initiator::start(client, "storage n3", [9; 32], nonce());
    let mut s = Responder::new(server, nonce());
    let mut server_says = None;
    for step in [0, 2] {
        tamper(step, &mut message);
        let mut answer = s.feed(&message);
        if answer.done.is_some() {
            server_says = answer.done.take();
        }
        if answer.send.is_empty() {
            return (Err(HandshakeError::Ended("closed".into())), server_says);
        }
        tamper(step + 1, &mut answer.send);
        let next = c.feed(&answer.send);
        if let Some(done) = next.done {
            return (done, server_says);
        }
        message = next.send;
    }
    unreachable!("the client decides after two answers");
}

#[test]
fn members_agree() {
    let (client, server) = run(terms(1), terms(1), |_, _| {});
    let agreed = server.unwrap().unwrap();
    assert_eq!(client.unwrap().version, VERSION_MAX);
    assert_eq!((agreed.name.as_str(), agreed.hello, agreed.version), ("storage n3", [9; 32], VERSION_MAX));
}

#[test]
fn each_mismatch_has_its_reason_on_both_sides() {
    let cases = [
        (terms(2), HandshakeError::WrongSecret),
        (Terms { cluster: ClusterId(6), ..terms(1) }, HandshakeError::WrongCluster),
        (Terms { purpose: Purpose::Channel, ..terms(1) }, HandshakeError::WrongPurpose),
        (
            Terms { versions: (VERSION_MAX + 1, 9), ..terms(1) },
            HandshakeError::Version {
                client_min: VERSION_MAX + 1,
                client_max: 9,
                server_min: VERSION_MIN,
                server_max: VERSION_MAX,
            },
        ),
    ];
    for (client, want) in cases {
        let (client, server) = run(client, terms(1), |_, _| {});
        assert_eq!((client, server), (Err(want.clone()), Some(Err(want))));
    }
}

#[test]
fn the_highest_common_version_is_chosen() {
    let newer = Terms { versions: (1, 4), ..terms(1) };
    let newest = Terms { versions: (3, 9), ..terms(1) };
    let (client, server) = run(newer, newest, |_, _| {});
    assert_eq!((client.unwrap().version, server.unwrap().unwrap().version), (4, 4));
}

#[test]
fn nobody_on_the_path_talks_the_versions_down() {
    let both = || Terms { versions: (1, 2), ..terms(1) };
    // The client's offer lowered: the server would choose 1, and the client sees that it is not
    // the highest common one.
    let (client, _) = run(both(), both(), |step, m| {
        if step == 0 {
            m[10] = 1;
        }
    });
    assert!(matches!(client, Err(HandshakeError::Malformed(_))), "{client:?}");
    // The server's answer lowered as well: then the proofs do not match.
    let (client, server) = run(both(), both(), |step, m| match step {
        0 => m[10] = 1,
        1 => m[12] = 1,
        _ => {}
    });
    assert_eq!((client, server), (Err(HandshakeError::WrongSecret), Some(Err(HandshakeError::WrongSecret))));
}

#[test]
fn a_recorded_client_is_of_no_use() {
    let mut recorded = Vec::new();
    let _ = run(terms(1), terms(1), |step, m| recorded.push((step, m.clone())));
    let of = |n: usize| recorded.iter().find(|(step, _)| *step == n).unwrap().1.clone();
    // A fresh server challenges anew, and the old proof does not answer it.
    let mut server = Responder::new(terms(1), nonce());
    assert!(server.feed(&of(0)).done.is_none());
    assert_eq!(server.feed(&of(2)).done, Some(Err(HandshakeError::WrongSecret)));
    // The control: against the old challenge the same proof is good.
    let mut old_nonce = [0; NONCE];
    old_nonce.copy_from_slice(&of(1)[16..]);
    let mut server = Responder::new(terms(1), old_nonce);
    server.feed(&of(0));
    assert!(matches!(server.feed(&of(2)).done, Some(Ok(_))));
    // Nor does a recorded server convince a fresh client.
    let (mut client, _) = Initiator::start(terms(1), "storage n3", [9; 32], nonce());
    client.feed(&of(1));
    assert_eq!(client.feed(&of(3)).done, Some(Err(HandshakeError::WrongSecret)));
}

#[test]
fn a_proof_sent_back_to_its_maker_is_refused() {
    // An impostor without the secret answers with the client's own MAC.
    let (mut client, hello) = Initiator::start(terms(1), "", [0; 32], nonce());
    let mut impostor = Responder::new(terms(99), nonce());
    let challenge = impostor.feed(&hello).send;
    let proof = client.feed(&challenge).send;
    let mut verdict = vec![0, 0];
    verdict.extend_from_slice(&proof[PROOF_BYTES - 32..]);
    assert_eq!(client.feed(&verdict).done, Some(Err(HandshakeError::WrongSecret)));
}

#[test]
fn names_are_cut_and_kept_printable() {
    let (mut client, hello) =
        Initiator::start(terms(1), &("a\n".to_owned() + &"ü".repeat(80)), [0; 32], nonce());
    let mut server = Responder::new(terms(1), nonce());
    let challenge = server.feed(&hello).send;
    let done = server.feed(&client.feed(&challenge).send).done;
    let name = done.unwrap().unwrap().name;
    assert!(name.starts_with("a?ü") && name.len() <= NAME_MAX && name.ends_with('ü'), "{name}");
}

#[test]
fn golden_hello() {
    let (_, hello) = Initiator::start(terms(1), "", [0; 32], [0xAB; NONCE]);
    let hex: String = hello.iter().map(|b| format!("{b:02x}")).collect();
    let nonce = "ab".repeat(NONCE);
    assert_eq!(hex, format!("46464e455400010a0100020001000000{}{nonce}", "05000000000000000000000000000000"));
}

/// Pins the whole exchange, proofs included, of this release and of the one before: releases N and
/// N-1 must keep understanding each other.
#[test]
fn golden_exchange() {
    for (versions, proofs) in [
        ((1, 1), ["d2836172d1452311", "0f8cc307042f23ad"]),
        ((1, 2), ["b8c461c5bc0b16ff", "d7f7b0655814e4b7"]),
    ] {
        let terms = || Terms { versions, ..terms(1) };
        let (mut client, hello) = Initiator::start(terms(), "storage n3", [9; 32], [0xAA; NONCE]);
        let mut server = Responder::new(terms(), [0xBB; NONCE]);
        let challenge = server.feed(&hello).send;
        let proof = client.feed(&challenge).send;
        let verdict = server.feed(&proof).send;
        let tail = |m: &[u8]| m[m.len() - 8..].iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!((hello.len(), challenge.len(), proof.len(), verdict.len()), (64, 48, 166, 34));
        assert_eq!([tail(&proof).as_str(), tail(&verdict).as_str()], proofs);
    }
}

proptest! {
    /// Every byte of every message matters: change one and no side that sees the change, or whose
    /// peer saw it, ends up in agreement.
    #[test]
    fn a_changed_byte_never_ends_in_mutual_agreement(step in 0..4usize, at in 0..400usize, flip in 1..=255u8) {
        let mut changed = false;
        let (client, server) = run(terms(1), terms(1), |now, m| {
            if now == step {
                let at = at % m.len();
                // An error's MAC field is not read; everything else is.
                m[at] ^= flip;
                changed = true;
            }
        });
        prop_assert!(changed);
        prop_assert!(client.is_err());
        // The server cannot know of a change in its last message.
        if step < 3 {
            prop_assert!(!matches!(server, Some(Ok(_))));
        }
    }

    /// Arbitrary input neither panics nor convinces.
    #[test]
    fn arbitrary_messages_are_refused(first in prop::collection::vec(any::<u8>(), 0..300), fix in any::<bool>()) {
        let mut first = first;
        if fix {
            first.resize(HELLO_BYTES, 0);
            first[..8].copy_from_slice(&MAGIC);
        }
        let mut server = Responder::new(terms(1), nonce());
        if server.feed(&first).done.is_none() {
            prop_assert!(matches!(server.feed(&[0; PROOF_BYTES]).done, Some(Err(_))));
        }
        let (mut client, _) = Initiator::start(terms(1), "", [0; 32], nonce());
        first.resize(CHALLENGE_BYTES, 0);
        if client.feed(&first).done.is_none() {
            prop_assert!(matches!(client.feed(&[0; VERDICT_BYTES]).done, Some(Err(_))));
        }
    }
}
