//! What a failed work completion and an asynchronous event mean, and what to do about it.

use super::ffi::event;

/// Why a device did not do the work that it was given. The queue pair is in its error state then,
/// and all work after it is flushed.
///
/// The numbers are `ibv_wc_status`; the meanings are those of the InfiniBand architecture
/// specification, volume 1, section 11.6.2 (completion return status).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError {
    /// 1
    #[error(
        "a message was longer than the receive posted for it, or than the device allows: the two sides disagree about the protocol; upgrade the older one"
    )]
    LocalLength,
    /// 2
    #[error("the device found its own queue pair inconsistent: a fault of the device or its driver")]
    LocalQueuePair,
    /// 4
    #[error(
        "local memory is not registered for this access: a fault of this program, or memory that was unmapped while registered"
    )]
    LocalProtection,
    /// 5
    #[error(
        "the work was flushed: the queue pair had failed before; the first error of the connection tells the cause"
    )]
    Flushed,
    /// 6
    #[error("a memory window could not be bound: its region does not allow it")]
    WindowBind,
    /// 7
    #[error("the peer's device sent a response that makes no sense: a fault of a device or of the path")]
    BadResponse,
    /// 8
    #[error(
        "the peer wrote to memory of this side that it may not write to: a fault of the peer, or a call that was over"
    )]
    LocalAccess,
    /// 9
    #[error(
        "the peer's device refused the request as invalid (too long for its receive, or an operation that it does not offer): the two sides disagree about the protocol; upgrade the older one"
    )]
    RemoteInvalidRequest,
    /// 10
    #[error(
        "the peer's device refused access to its memory: the key is not valid (any more), or the range is outside of what it names"
    )]
    RemoteAccess,
    /// 11
    #[error("the peer's device could not complete the request; see the peer's log")]
    RemoteOperation,
    /// 12
    #[error(
        "the peer's device did not answer after all retransmissions: the peer's process or machine is gone, or the path between the two devices is broken"
    )]
    NoAnswer,
    /// 13
    #[error(
        "the peer had no receive posted although it had granted one: a fault of the peer, or a peer that is stuck"
    )]
    ReceiverNotReady,
    /// 15
    #[error("the peer's device refused a READ as invalid: more of them at one time than was agreed")]
    RemoteInvalidRead,
    /// 16
    #[error("the peer aborted the operation")]
    RemoteAborted,
    /// 19
    #[error("the device failed for good: reset or replace it")]
    DeviceFatal,
    /// 20
    #[error("the peer's response did not come in time")]
    ResponseTimeout,
    /// 21
    #[error("the device reports a transport error without details; see the kernel's log")]
    General,
    /// Statuses of queue pair types and features that Firefly does not use, and of newer libraries.
    #[error("the device reports status {0}, which has no meaning for this kind of queue pair")]
    Other(u32),
}

impl WorkError {
    /// Of an `ibv_wc_status` that is not success.
    pub(crate) fn of(status: u32) -> WorkError {
        match status {
            1 => WorkError::LocalLength,
            2 => WorkError::LocalQueuePair,
            4 => WorkError::LocalProtection,
            5 => WorkError::Flushed,
            6 => WorkError::WindowBind,
            7 => WorkError::BadResponse,
            8 => WorkError::LocalAccess,
            9 => WorkError::RemoteInvalidRequest,
            10 => WorkError::RemoteAccess,
            11 => WorkError::RemoteOperation,
            12 => WorkError::NoAnswer,
            13 => WorkError::ReceiverNotReady,
            15 => WorkError::RemoteInvalidRead,
            16 => WorkError::RemoteAborted,
            19 => WorkError::DeviceFatal,
            20 => WorkError::ResponseTimeout,
            21 => WorkError::General,
            other => WorkError::Other(other),
        }
    }

    /// Whether it points at the path or the device rather than at one of the two programs: another
    /// rail may do better.
    pub fn is_of_the_path(self) -> bool {
        matches!(
            self,
            WorkError::NoAnswer
                | WorkError::BadResponse
                | WorkError::DeviceFatal
                | WorkError::ResponseTimeout
                | WorkError::LocalQueuePair
                | WorkError::General
        )
    }
}

/// What an asynchronous event says about what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Concerns {
    /// The whole device: it does no more work.
    Device(&'static str),
    /// One port cannot send.
    PortDown(&'static str),
    /// One port can send again, perhaps with other addresses.
    PortUp,
    /// One queue pair: it does no more work.
    Queue(&'static str),
    /// Nothing that a connection depends on.
    Nothing,
}

/// Sorts an `ibv_event_type`. Unknown ones are events of newer kernels, about things not used here.
pub(crate) fn concerns(event: u32) -> Concerns {
    match event {
        event::DEVICE_FATAL => Concerns::Device("the device has failed or was removed"),
        event::PORT_ERR => Concerns::PortDown("the port is down"),
        event::PORT_ACTIVE | event::LID_CHANGE | event::GID_CHANGE => Concerns::PortUp,
        event::CQ_ERR => Concerns::Queue("the completion queue overran"),
        event::QP_FATAL => Concerns::Queue("the queue pair failed within the device"),
        event::QP_REQ_ERR => Concerns::Queue("the peer sent a request that is invalid"),
        event::QP_ACCESS_ERR => Concerns::Queue("the peer asked for memory that it may not reach"),
        event::PATH_MIG_ERR => Concerns::Queue("the device could not move to another path"),
        event::COMM_EST | event::SQ_DRAINED | event::PATH_MIG | event::QP_LAST_WQE_REACHED => {
            Concerns::Nothing
        }
        _ => Concerns::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Each status of the specification that an RC queue pair can report, by its number, with the
    /// word by which its message is recognised.
    #[test]
    fn each_status_of_a_completion_has_its_own_message() {
        let table = [
            (1, "longer than the receive"),
            (2, "inconsistent"),
            (4, "local memory is not registered"),
            (5, "flushed"),
            (6, "memory window"),
            (7, "makes no sense"),
            (8, "wrote to memory of this side"),
            (9, "refused the request as invalid"),
            (10, "refused access to its memory"),
            (11, "could not complete"),
            (12, "after all retransmissions"),
            (13, "no receive posted"),
            (15, "refused a READ"),
            (16, "aborted"),
            (19, "failed for good"),
            (20, "did not come in time"),
            (21, "without details"),
            (3, "status 3"),
            (14, "status 14"),
            (22, "status 22"),
            (23, "status 23"),
            (4711, "status 4711"),
        ];
        let mut seen = HashSet::new();
        for (status, part) in table {
            let text = WorkError::of(status).to_string();
            assert!(text.contains(part), "{status}: {text}");
            assert!(seen.insert(text), "{status} has the message of another");
        }
        assert!(WorkError::of(12).is_of_the_path() && !WorkError::of(10).is_of_the_path());
    }

    #[test]
    fn events_are_sorted_by_what_they_end() {
        assert!(matches!(concerns(event::DEVICE_FATAL), Concerns::Device(_)));
        assert!(matches!(concerns(event::PORT_ERR), Concerns::PortDown(_)));
        assert_eq!(concerns(event::PORT_ACTIVE), Concerns::PortUp);
        for fatal in [event::CQ_ERR, event::QP_FATAL, event::QP_REQ_ERR, event::QP_ACCESS_ERR] {
            assert!(matches!(concerns(fatal), Concerns::Queue(_)));
        }
        // That communication is established is no news; an unknown event is none either.
        assert_eq!((concerns(event::COMM_EST), concerns(9999)), (Concerns::Nothing, Concerns::Nothing));
    }
}
