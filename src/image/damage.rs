//! Layers that were found damaged. Their marker becomes `damaged.json`: they count as missing, so that the next pull of an
//! image that needs one fetches that one alone. The files stay for as long as a container has them mounted.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::layers::{delete, set_aside, Layers, MARKER};
use crate::error::{Context, Error, Result};
use crate::sys::file::{self, Durability};

/// Instead of the marker.
const DAMAGED: &str = "damaged.json";
/// In the name of a damaged directory that has given its place to a new one.
const ASIDE: &str = ".damaged-";

#[derive(Serialize, Deserialize)]
struct Note {
    version: u32,
    reason: String,
}

/// What is known about them.
#[derive(Default)]
pub struct Damaged {
    /// Why, of layers that have not been made again.
    reasons: HashMap<Digest, String>,
    /// Directories that are only there for containers.
    aside: Vec<(Digest, PathBuf)>,
}

impl Damaged {
    /// Takes a directory found at start, if it is one of a damaged layer.
    pub fn restore(&mut self, name: &str, path: &Path) -> bool {
        let (hex, aside) = name.split_once(ASIDE).map_or((name, false), |(hex, _)| (hex, true));
        let Ok(chain_id) = Digest::parse(&format!("sha256:{hex}")) else { return false };
        if !path.join(DAMAGED).exists() {
            return false;
        }
        if aside {
            self.aside.push((chain_id, path.to_owned()));
        } else {
            // The file being there says it all; the words are for people.
            let note = file::read(&path.join(DAMAGED), 64 << 10).ok().and_then(|data| serde_json::from_slice::<Note>(&data).ok());
            self.reasons.insert(chain_id, note.map_or_else(|| "damaged".to_owned(), |n| n.reason));
        }
        true
    }

    pub fn reason(&self, chain_id: &Digest) -> Option<&str> {
        self.reasons.get(chain_id).map(String::as_str)
    }
}

impl Layers {
    /// Why a layer is missing: damaged, or simply not there.
    pub fn why_missing(&self, chain_id: &Digest) -> String {
        match self.state.lock().damaged.reason(chain_id) {
            Some(reason) => format!("layer {chain_id} is damaged: {reason}"),
            None => format!("layer {chain_id} is missing"),
        }
    }

    /// From now on a layer counts as missing. False when it has gone meanwhile.
    pub fn condemn(&self, chain_id: &Digest, reason: &str) -> Result<bool> {
        let place = self.dir.join(chain_id.hex());
        {
            let mut state = self.state.lock();
            if state.busy.contains(chain_id) || !state.ready.contains_key(chain_id) {
                return Ok(false);
            }
            state.busy.insert(chain_id.clone());
        }
        let _claim = self.claimed(chain_id);
        let data = serde_json::to_vec(&Note { version: 1, reason: reason.to_owned() }).context(|| "write the note of a damaged layer")?;
        file::write(&place.join(DAMAGED), &data, 0o600, Durability::Synced)?;
        file::remove_file(&place.join(MARKER))?;
        let mut state = self.state.lock();
        state.ready.remove(chain_id);
        state.damaged.reasons.insert(chain_id.clone(), reason.to_owned());
        Ok(true)
    }

    /// Clears a layer's place for a new one. A damaged layer that a container may have mounted is moved out of the way with
    /// its files in place.
    pub fn make_room(&self, chain_id: &Digest, place: &Path) -> Result<()> {
        if place.join(DAMAGED).exists() && self.in_container(chain_id) {
            let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
            let to = place.with_file_name(format!("{}{ASIDE}{stamp}", chain_id.hex()));
            std::fs::rename(place, &to).context(|| format!("move {} aside", place.display()))?;
            self.state.lock().damaged.aside.push((chain_id.clone(), to));
        } else if place.exists() {
            delete(vec![set_aside(place)?]);
        }
        self.state.lock().damaged.reasons.remove(chain_id);
        Ok(())
    }

    fn in_container(&self, chain_id: &Digest) -> bool {
        self.state.lock().holds.iter().any(|(holder, chain)| holder.starts_with("container/") && chain.contains(chain_id))
    }

    /// Directories of damaged layers that no container has any more, moved away for deletion. The reasons stay known: these
    /// layers are missing still.
    pub fn useless_damaged(&self) -> Vec<PathBuf> {
        let mut useless = Vec::new();
        let ours: Vec<Digest> = {
            let mut state = self.state.lock();
            let held: HashSet<Digest> = state.holds.values().flatten().cloned().collect();
            state.damaged.aside.retain(|(chain_id, path)| {
                let stays = held.contains(chain_id);
                if !stays {
                    useless.push(path.clone());
                }
                stays
            });
            let ours: Vec<Digest> =
                state.damaged.reasons.keys().filter(|c| !held.contains(*c) && !state.busy.contains(*c)).cloned().collect();
            // Nobody makes them meanwhile.
            state.busy.extend(ours.iter().cloned());
            ours
        };
        let claims: Vec<_> = ours.iter().map(|chain_id| self.claimed(chain_id)).collect();
        useless.extend(ours.iter().map(|c| self.dir.join(c.hex())).filter(|place| place.join(DAMAGED).exists()));
        let moved = useless.into_iter().filter_map(|path| set_aside(&path).map_err(|e| log::error!("image: {e}")).ok()).collect();
        drop(claims);
        moved
    }

    /// Keeps the layers of a container found at start, whatever is left of them: those of one that runs may be damaged by
    /// now. An error when one is gone altogether.
    pub fn hold_restored(&self, holder: &str, chain: &[Digest]) -> Result<()> {
        let mut state = self.state.lock();
        state.holds.insert(holder.to_owned(), chain.to_vec());
        let here = |c: &Digest| state.ready.contains_key(c) || state.damaged.reasons.contains_key(c);
        match chain.iter().find(|c| !here(c)) {
            Some(missing) => Err(Error::internal(format!("layer {missing} is missing; pull the image again"))),
            None => Ok(()),
        }
    }
}
