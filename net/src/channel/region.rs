//! Memory of the caller that devices may read and write where it lies.

use super::ChannelError;
use crate::fabric::Fabric;
use crate::verbs::{self, Device, Keys, Reach};
use std::sync::{Arc, PoisonError, RwLock};

/// One registered stretch of memory, with each device.
struct Entry {
    id: u64,
    start: usize,
    end: usize,
    devices: Vec<(Arc<Device>, verbs::Region)>,
}

/// What is registered now. Few and long-lived: the callers' staging memory.
static REGISTERED: RwLock<(u64, Vec<Entry>)> = RwLock::new((0, Vec::new()));

/// Memory that payloads of channels may come from and go to without being copied, as long as this
/// lives. Registering costs time by the page: do it for memory that is used again and again.
///
/// A peer gets the key of a region only together with the place of a payload that was posted there
/// ([`super::Channel::post_recv`]), but that key is good for all of the region until this is
/// dropped: put nothing into it that peers may not write.
#[derive(Debug)]
pub struct Region {
    id: u64,
    registrations: usize,
}

impl Region {
    /// Registers `len` bytes at `ptr` with every device of `fabric`; without devices this does
    /// nothing and costs nothing.
    ///
    /// # Errors
    /// A device refuses, such as for the limit of locked memory (`ulimit -l`).
    ///
    /// # Safety
    /// The memory must stay mapped until this is dropped. Peers of this process's channels may then
    /// write it at any time: it must not be accessed through Rust references except for payloads
    /// whose receives were reported. Drop it before the memory is given back: when the drop is
    /// over, no device touches the memory any more; channels that were still moving a payload there
    /// fail.
    pub unsafe fn register(fabric: &Fabric, ptr: *mut u8, len: usize) -> Result<Region, ChannelError> {
        let mut devices: Vec<(Arc<Device>, verbs::Region)> = Vec::new();
        for rail in fabric.rails() {
            if len == 0 || devices.iter().any(|(d, _)| Arc::ptr_eq(d, &rail.device)) {
                continue;
            }
            // SAFETY: the caller's promise.
            let region = unsafe { verbs::Region::new(&rail.device, ptr, len, Reach::Peer) };
            let region = region.map_err(|e| ChannelError::device(rail.device.name(), e))?;
            devices.push((rail.device.clone(), region));
        }
        let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
        let (id, registrations) = (registered.0, devices.len());
        registered.0 += 1;
        if registrations > 0 {
            let (start, end) = (ptr as usize, ptr as usize + len);
            registered.1.push(Entry { id, start, end, devices });
        }
        Ok(Region { id, registrations })
    }

    /// Devices that it is registered with.
    pub fn registrations(&self) -> usize {
        self.registrations
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
        registered.1.retain(|entry| entry.id != self.id);
    }
}

/// The keys by which `device` knows all of `ptr..ptr + len`, if one region holds it.
pub(super) fn find(device: &Arc<Device>, ptr: *const u8, len: usize) -> Option<Keys> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    let (start, end) = (ptr as usize, (ptr as usize).checked_add(len)?);
    let entry = registered.1.iter().find(|e| e.start <= start && end <= e.end)?;
    entry.devices.iter().find(|(d, _)| Arc::ptr_eq(d, device)).map(|(_, region)| region.keys())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_devices_a_region_is_nothing() {
        let mut memory = vec![0u8; 4096];
        // SAFETY: the memory outlives the region, and no device is there to write it.
        let region = unsafe { Region::register(&Fabric::tcp(), memory.as_mut_ptr(), memory.len()) }.unwrap();
        assert_eq!(region.registrations(), 0);
    }
}
