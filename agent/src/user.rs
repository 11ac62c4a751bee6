//! Whom a rank runs as.

use crate::files::Prepare;
use crate::sys::{self, Credentials};
use std::ffi::CString;

/// The user to change to; `None`: stay who we are.
pub(crate) fn credentials(prepare: &Prepare) -> Result<Option<Credentials>, String> {
    let ours = rustix::process::geteuid().as_raw();
    if prepare.user.is_empty() || (prepare.uid == ours && ours != 0) {
        return Ok(None);
    }
    if ours != 0 {
        return Err(format!(
            "the agent runs as uid {ours} and cannot run a job of {} (uid {}): run the agent as root, or submit as its user",
            prepare.user, prepare.uid
        ));
    }
    let name = CString::new(prepare.user.clone()).map_err(|_| "the user's name contains a NUL".to_owned())?;
    let groups = if prepare.uid == 0 { vec![0] } else { sys::groups_of(&name, prepare.gid) };
    Ok(Some(Credentials { uid: prepare.uid, gid: prepare.gid, groups }))
}
