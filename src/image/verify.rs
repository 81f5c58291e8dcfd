//! Image verifiers in containerd's style: every program of a directory is asked whether an image may be pulled. It gets
//! `-name REFERENCE -digest DIGEST -stdin-media-type TYPE` and the image's descriptor as JSON on stdin; exit 0 admits, anything
//! else rejects, and what it prints is the reason. They run one after another by name, before anything of the image is
//! unpacked, and a program that cannot be asked rejects too.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::manifest::Descriptor;
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::file;
use crate::sys::process::Program;

/// How clients know the error (kubelet: ErrSignatureValidationFailed).
pub const REJECTED: &str = "SignatureValidationFailed";
const MEDIA_TYPE: &str = "application/vnd.oci.descriptor.v1+json";
/// Bytes kept of what a verifier prints.
const OUTPUT: usize = 16 << 10;
/// Characters of that which go into the error.
const REASON: usize = 1024;

/// Which programs, and how long each may take.
#[derive(Clone, Debug)]
pub struct Verifiers {
    /// None, absent or empty: every image is admitted.
    pub dir: Option<PathBuf>,
    pub timeout: Duration,
    /// Programs at most; with more in the directory nothing is admitted.
    pub max: usize,
}

impl Default for Verifiers {
    fn default() -> Verifiers {
        Verifiers { dir: None, timeout: Duration::from_secs(10), max: 10 }
    }
}

impl Verifiers {
    /// Asks all of them about the image that `name` led to. A rejection has code UNKNOWN and begins with `REJECTED`.
    pub fn admit(&self, name: &str, image: &Descriptor, cancel: &Cancel) -> Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let programs = programs(dir)?;
        if programs.len() > self.max {
            return Err(rejected(format!("{}: {} image verifiers, at most {} are allowed", dir.display(), programs.len(), self.max)));
        }
        let about = Descriptor { annotations: Default::default(), urls: Vec::new(), platform: None, ..image.clone() };
        let descriptor = serde_json::to_vec(&about).context(|| "write the descriptor for image verifiers")?;
        for path in programs {
            let verifier = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let program = Program::new(&path)
                .args(["-name", name, "-digest", image.digest.as_str(), "-stdin-media-type", MEDIA_TYPE])
                .stdin(descriptor.clone())
                .output_limit(OUTPUT);
            let output = match program.run(cancel, self.timeout) {
                Ok(output) => output,
                Err(e) => {
                    cancel.check()?;
                    return Err(rejected(format!("image verifier {verifier} did not judge {name}: {e}")));
                }
            };
            if output.status.success() {
                log::debug!("image: verifier {verifier} admits {name}: {}", reason(&output.stdout));
                continue;
            }
            let said = [&output.stdout, &output.stderr].into_iter().map(|text| reason(text)).find(|text| !text.is_empty());
            let said = said.unwrap_or_else(|| "no reason given".to_owned());
            return Err(rejected(format!("image verifier {verifier} rejects {name} ({}): {said}", output.describe())));
        }
        Ok(())
    }
}

fn rejected(why: String) -> Error {
    Error::new(Code::Unknown, format!("{REJECTED}: {why}"))
}

/// The programs, by name; files whose name begins with a dot are none. A file that cannot be executed is one that rejects.
fn programs(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in file::list(dir).map_err(|e| rejected(format!("look for image verifiers: {e}")))? {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        let meta = std::fs::metadata(&path).map_err(|e| rejected(format!("look at {}: {e}", path.display())))?;
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            return Err(rejected(format!("{} is in the directory of image verifiers and cannot be executed", path.display())));
        }
        found.push(path);
    }
    Ok(found)
}

/// What a program printed, on one line and of bounded length.
fn reason(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
    words.chars().take(REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::OCI_MANIFEST;
    use crate::image::Digest;
    use std::time::Instant;

    struct Site {
        dir: tempfile::TempDir,
        verifiers: Verifiers,
    }

    /// Written by a process of its own: a descriptor of ours, inherited by a child of another test, would make it busy.
    fn program(path: &Path, text: &str) {
        let write = Program::new("/bin/sh").args(["-c", "cat > \"$0\" && chmod 755 \"$0\""]).arg(path).stdin(text.into());
        write.run_ok(&Cancel::never(), Duration::from_secs(60)).unwrap();
    }

    impl Site {
        fn new(scripts: &[(&str, &str)]) -> Site {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("bin")).unwrap();
            for (name, script) in scripts {
                program(&dir.path().join("bin").join(name), &format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display()));
            }
            let verifiers = Verifiers { dir: Some(dir.path().join("bin")), timeout: Duration::from_secs(20), max: 3 };
            Site { dir, verifiers }
        }

        fn admit(&self) -> Result<()> {
            let mut descriptor = Descriptor::new(OCI_MANIFEST, Digest::of(b"m"), 7);
            descriptor.annotations.insert("a".into(), "b".into());
            self.verifiers.admit("q.io/x/y:v1", &descriptor, &Cancel::never())
        }

        fn rejected(&self) -> String {
            let e = self.admit().unwrap_err();
            assert!(e.code() == Code::Unknown && e.message().starts_with("SignatureValidationFailed: "), "{e}");
            e.message().to_owned()
        }
    }

    #[test]
    fn all_are_asked_by_name_and_told_the_same() {
        let site = Site::new(&[("b", "echo b $* >> log; cat >> log"), ("a", "echo a >> log; cat > /dev/null; echo fine; echo x >&2")]);
        std::fs::write(site.dir.path().join("bin/.hidden"), "no program").unwrap();
        site.admit().unwrap();
        let log = std::fs::read_to_string(site.dir.path().join("log")).unwrap();
        let digest = Digest::of(b"m");
        let json = format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{digest}","size":7}}"#);
        assert_eq!(log, format!("a\nb -name q.io/x/y:v1 -digest {digest} -stdin-media-type {MEDIA_TYPE}\n{json}"));
    }

    #[test]
    fn absent_or_empty_directories_admit() {
        let mut site = Site::new(&[]);
        site.admit().unwrap();
        site.verifiers.dir = Some(site.dir.path().join("none"));
        site.admit().unwrap();
        site.verifiers.dir = None;
        site.admit().unwrap();
    }

    #[test]
    fn a_rejection_names_verifier_and_reason() {
        let site = Site::new(&[("a", "exit 0"), ("b", "printf 'no\\n signature\\033[31m\\0!'; exit 3"), ("c", "touch asked")]);
        let words = site.rejected();
        assert_eq!(words, "SignatureValidationFailed: image verifier b rejects q.io/x/y:v1 (exit 3): no signature [31m !");
        assert!(!site.dir.path().join("asked").exists());
        assert!(Site::new(&[("a", "echo because >&2; exit 1")]).rejected().ends_with("(exit 1): because"));
        assert!(Site::new(&[("a", "kill -9 $$")]).rejected().ends_with("(signal 9): no reason given"));
    }

    #[test]
    fn output_without_end_is_bounded() {
        let words = Site::new(&[("a", "head -c 3000000 /dev/zero | tr '\\0' x; exit 1")]).rejected();
        assert!(words.len() < 2000 && words.ends_with("xxx"), "{}", words.len());
        assert!(Site::new(&[("a", "head -c 100000 /dev/urandom; exit 1")]).rejected().len() < 8000);
    }

    #[test]
    fn one_that_hangs_is_killed_with_its_children() {
        let mut site = Site::new(&[("a", "sleep 600 & echo $! > child; wait")]);
        // A busy machine may not have begun with it within the first timeout.
        let child = [500, 4000, 16_000].into_iter().find_map(|ms| {
            site.verifiers.timeout = Duration::from_millis(ms);
            let begin = Instant::now();
            let words = site.rejected();
            assert!(words.contains("image verifier a did not judge") && words.contains("killed"), "{words}");
            assert!(begin.elapsed() < Duration::from_millis(ms) + Duration::from_secs(20));
            std::fs::read_to_string(site.dir.path().join("child")).ok()?.trim().parse::<i32>().ok()
        });
        let child = child.expect("it begins");
        let end = Instant::now() + Duration::from_secs(10);
        // Its parent is dead: whoever reaps orphans here takes it away, or leaves a zombie.
        let alive = || std::fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|s| !s.contains(") Z"));
        while alive() {
            assert!(Instant::now() < end, "the child lives on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn what_cannot_be_asked_rejects() {
        let site = Site::new(&[("a", "exit 0")]);
        std::fs::write(site.dir.path().join("bin/readme"), "x").unwrap();
        assert!(site.rejected().contains("readme is in the directory"));
        let site = Site::new(&[("a", ""), ("b", ""), ("c", ""), ("d", "")]);
        assert!(site.rejected().contains("4 image verifiers, at most 3"));
        let site = Site::new(&[]);
        program(&site.dir.path().join("bin/a"), "#!/nonexistent/interpreter\n");
        assert!(site.rejected().contains("image verifier a did not judge"));
        let mut site = Site::new(&[]);
        site.verifiers.dir = Some(site.dir.path().join("file"));
        std::fs::write(site.dir.path().join("file"), "x").unwrap();
        assert!(site.rejected().contains("look for image verifiers: list"));
    }

    #[test]
    fn a_client_that_leaves_is_no_rejection() {
        let site = Site::new(&[("a", "sleep 600")]);
        let cancel = Cancel::never();
        let other = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            other.set();
        });
        let e = site.verifiers.admit("x", &Descriptor::new(OCI_MANIFEST, Digest::of(b"m"), 7), &cancel).unwrap_err();
        assert_eq!(e.code(), Code::Cancelled);
        thread.join().unwrap();
    }
}
