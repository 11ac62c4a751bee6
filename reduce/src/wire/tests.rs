//! Two wires joined in memory: what is checked on arrival, with the controls that show that each check
//! is what finds it.

use super::*;
use crate::header::{NO_ROOT, OpKind};
use firefly_net::{ChannelCounters, ChannelError, HEADER_BYTES, Incoming};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

/// What is on its way in one direction.
#[derive(Default)]
struct Pipe {
    messages: VecDeque<([u8; HEADER_BYTES], Vec<u8>)>,
    /// Flip this bit of the next payload.
    damage: Option<usize>,
}

struct MemoryLink {
    out: Arc<Mutex<Pipe>>,
    into: Arc<Mutex<Pipe>>,
    done: Vec<Completion>,
}

impl Channel for MemoryLink {
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError> {
        let mut data = Vec::new();
        if len > 0 {
            // SAFETY: the caller's promise.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len) });
        }
        let mut pipe = self.out.lock().unwrap();
        if !data.is_empty()
            && let Some(bit) = pipe.damage.take()
        {
            data[bit / 8] ^= 1 << (bit % 8);
        }
        pipe.messages.push_back((*header, data));
        self.done.push(Completion::Sent { token });
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<Incoming>, ChannelError> {
        let pipe = self.into.lock().unwrap();
        Ok(pipe.messages.front().map(|(header, data)| Incoming { header: *header, len: data.len() }))
    }

    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), ChannelError> {
        let (_, data) = self.into.lock().unwrap().messages.pop_front().expect("peeked before");
        assert_eq!(data.len(), len);
        if len > 0 {
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), ptr, len) };
        }
        self.done.push(Completion::Received { token });
        Ok(())
    }

    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        let any = !self.done.is_empty();
        out.append(&mut self.done);
        Ok(any)
    }

    fn poll_fds(&self, _: &mut Vec<(RawFd, bool)>) {}

    fn counters(&self) -> ChannelCounters {
        ChannelCounters::default()
    }

    fn transport(&self) -> &'static str {
        "memory"
    }
}

struct Pair {
    wires: [Wire; 2],
    /// From rank 0 to rank 1.
    there: Arc<Mutex<Pipe>>,
}

fn pair(groups: [u32; 2], checksums: bool) -> Pair {
    let (there, back) = (Arc::new(Mutex::new(Pipe::default())), Arc::new(Mutex::new(Pipe::default())));
    let link = |out: &Arc<Mutex<Pipe>>, into: &Arc<Mutex<Pipe>>| -> Option<(Box<dyn Channel>, bool)> {
        Some((Box::new(MemoryLink { out: out.clone(), into: into.clone(), done: Vec::new() }), false))
    };
    let now = Instant::now();
    let mut wires = [
        Wire::new(0, groups[0], vec![None, link(&there, &back)], now),
        Wire::new(1, groups[1], vec![link(&back, &there), None], now),
    ];
    for wire in &mut wires {
        wire.checksums = checksums;
    }
    Pair { wires, there }
}

fn descriptor(count: u64) -> Descriptor {
    Descriptor { op: OpKind::Broadcast as u8, dtype: 0, redop: u8::MAX, root: NO_ROOT, count }
}

/// Rank 0 sends `sent` as operation 1, rank 1 takes it; what rank 1 finds.
fn transfer(
    pair: &mut Pair,
    theirs: Descriptor,
    mine: Descriptor,
    sent: &[u8],
) -> Result<Vec<u8>, ReduceError> {
    let mut got = vec![0; sent.len()];
    let now = Instant::now();
    pair.wires[0].issue(1, theirs)?;
    pair.wires[1].issue(1, mine)?;
    pair.wires[1].recv(0, 1, 0, mine, got.as_mut_ptr(), got.len());
    pair.wires[0].send(1, 1, 0, theirs, 0, sent.as_ptr(), sent.len());
    loop {
        let moved = pair.wires[1].progress(now)? | pair.wires[0].progress(now)?;
        if pair.wires[1].take_events().iter().any(|e| matches!(e, Event::Received { .. })) {
            return Ok(got);
        }
        assert!(moved, "the message never came");
    }
}

#[test]
fn a_checksum_finds_a_flipped_bit_and_nothing_else_does() {
    for size in [100usize, 100_000] {
        let sent: Vec<u8> = (0..size).map(|i| i as u8).collect();
        let d = descriptor(size as u64);
        for bit in [0, 7 * 8 + 3, size * 8 - 1] {
            let mut checked = pair([7, 7], true);
            assert_eq!(transfer(&mut checked, d, d, &sent).unwrap(), sent, "whole payloads pass");
            let mut checked = pair([7, 7], true);
            checked.there.lock().unwrap().damage = Some(bit);
            let error = transfer(&mut checked, d, d, &sent).unwrap_err();
            assert!(matches!(error, ReduceError::Protocol { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains("from rank 0") && text.contains("damaged"), "{text}");
            // The control: without checksums nobody notices.
            let mut trusting = pair([7, 7], false);
            trusting.there.lock().unwrap().damage = Some(bit);
            assert_ne!(transfer(&mut trusting, d, d, &sent).unwrap(), sent);
        }
    }
}

#[test]
fn a_message_of_another_forming_of_the_group_is_refused() {
    let sent = [1u8; 100];
    let d = descriptor(100);
    // The control: of this forming it is taken.
    assert!(transfer(&mut pair([7, 7], false), d, d, &sent).is_ok());
    let error = transfer(&mut pair([6, 7], false), d, d, &sent).unwrap_err();
    assert!(error.to_string().contains("rank 0 sent a message that is not one of this group"), "{error}");
}

#[test]
fn a_message_of_another_operation_is_an_error_that_names_both() {
    let sent = [1u8; 100];
    let error = transfer(&mut pair([7, 7], false), descriptor(50), descriptor(100), &sent).unwrap_err();
    assert!(matches!(error, ReduceError::Mismatch { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("x 50") && text.contains("x 100") && text.contains("rank 0"), "{text}");
}

#[test]
fn who_is_asked_says_here_now_or_when_he_comes() {
    let mut pair = pair([7, 7], false);
    let asked = Instant::now();
    let d = descriptor(1);
    let settle = |pair: &mut Pair| {
        let now = Instant::now();
        while pair.wires[0].progress(now).unwrap() | pair.wires[1].progress(now).unwrap() {}
    };
    pair.wires[0].issue(1, d).unwrap();
    pair.wires[0].probe(1, 1, d);
    settle(&mut pair);
    assert_eq!(pair.wires[0].not_here(1, asked), [1], "rank 1 has not come");
    pair.wires[1].issue(1, d).unwrap();
    settle(&mut pair);
    assert_eq!(pair.wires[0].not_here(1, asked), [0u32; 0], "it answers as soon as it has");
    assert_eq!(pair.wires[0].not_here(2, asked), [1], "but only for what it has issued");
    let later = Instant::now();
    assert_eq!(pair.wires[0].not_here(1, later), [1], "an old answer is none");
    pair.wires[0].probe(1, 1, d);
    settle(&mut pair);
    assert_eq!(pair.wires[0].not_here(1, later), [0u32; 0]);
}
