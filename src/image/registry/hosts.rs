//! `certs.d/<host>/hosts.toml` in containerd's form, and Docker's certificate files where there is none. Read anew for
//! every pull. A file that cannot be understood is an error with its line; a key that is not known is warned about.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};
use toml::Spanned;

use super::url::split_port;
use crate::error::{Context, Error, Result};
use crate::sys::file;

const FILE: &str = "hosts.toml";
const FILE_LIMIT: u64 = 1 << 20;

/// One place to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// None: the registry's own address, as if there were no file.
    pub place: Option<Place>,
    pub pull: bool,
    pub resolve: bool,
    pub tls: TlsFiles,
    /// Sent to this host alone; they may hold secrets, so they are never shown.
    pub headers: Vec<(String, Secret)>,
    pub dial_timeout: Option<Duration>,
}

/// `scheme://authority` and the path that requests begin with (`/v2` but for override_path).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub scheme: &'static str,
    pub authority: String,
    pub path: String,
}

/// Text that `Debug` does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// Files of certificates, absolute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    pub ca: Vec<PathBuf>,
    /// Certificate and key; without a key file, the certificate's has both.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    pub skip_verify: Option<bool>,
}

impl TlsFiles {
    pub fn is_empty(&self) -> bool {
        *self == TlsFiles::default()
    }
}

impl Default for Host {
    fn default() -> Host {
        Host { place: None, pull: true, resolve: true, tls: TlsFiles::default(), headers: Vec::new(), dial_timeout: None }
    }
}

/// The hosts to ask for a registry, in order; the registry itself is the last.
pub fn load(root: &Path, registry: &str) -> Result<Vec<Host>> {
    match directory(root, registry, true)? {
        Some(dir) => load_dir(&dir),
        None => Ok(vec![Host::default()]),
    }
}

/// The certificate files of a host that a registry leads to (a redirect, a token server). `_default` is for registries.
pub fn tls_of(root: &Path, authority: &str) -> Result<TlsFiles> {
    let Some(dir) = directory(root, authority, false)? else { return Ok(TlsFiles::default()) };
    Ok(load_dir(&dir)?.pop().unwrap_or_default().tls)
}

fn load_dir(dir: &Path) -> Result<Vec<Host>> {
    let path = dir.join(FILE);
    let data = match std::fs::symlink_metadata(&path) {
        Ok(_) => file::read(&path, FILE_LIMIT)?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e).context(|| format!("look at {}", path.display())),
    };
    if data.is_empty() {
        return Ok(vec![Host { tls: docker_files(dir)?, ..Host::default() }]);
    }
    let wrong = |what: &str| Error::precondition(format!("{}: {what}", path.display()));
    let text = std::str::from_utf8(&data).map_err(|_| wrong("not UTF-8"))?;
    let (hosts, warnings) = parse(text, dir).map_err(|e| wrong(e.message()))?;
    for warning in warnings {
        log::warn!("image: {}: {warning}", path.display());
    }
    Ok(hosts)
}

/// The first directory that exists: `host_port_`, `host:port`, `_default`.
fn directory(root: &Path, registry: &str, fallback: bool) -> Result<Option<PathBuf>> {
    let mut names = Vec::new();
    // An authority never holds a slash, but this is a path made from a stranger's text.
    if !registry.is_empty() && !registry.contains('/') && registry != "." && registry != ".." {
        if let (_, Some(port)) = split_port(registry) {
            names.push(format!("{}_{port}_", &registry[..registry.len() - port.len() - 1]));
        }
        names.push(registry.to_owned());
    }
    if fallback {
        names.push("_default".to_owned());
    }
    for dir in names.iter().map(|name| root.join(name)) {
        match std::fs::metadata(&dir) {
            Ok(meta) if meta.is_dir() => return Ok(Some(dir)),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {}
            Err(e) => return Err(e).context(|| format!("look at {}", dir.display())),
        }
    }
    Ok(None)
}

/// `*.crt` are authorities, `NAME.cert` with `NAME.key` client certificates.
fn docker_files(dir: &Path) -> Result<TlsFiles> {
    let mut found = TlsFiles::default();
    for path in file::list(dir)? {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => found.ca.push(path),
            Some("cert") => {
                let key = Some(path.with_extension("key")).filter(|key| key.exists());
                found.client.push((path, key));
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Parses a hosts.toml that lies in `dir`. The second list is what was not understood and left out.
pub fn parse(text: &str, dir: &Path) -> Result<(Vec<Host>, Vec<String>)> {
    let mut parser = Parser { text, dir, warnings: Vec::new() };
    let document = DeTable::parse(text).map_err(|e| parser.wrong(e.span().map_or(0, |s| s.start), e.message()))?;
    let document = document.get_ref();
    let mut hosts = Vec::new();
    let mut server = "";
    for (key, value) in document {
        match key.get_ref().as_ref() {
            "server" => server = parser.string("server", value)?,
            "host" => {
                let table = value.get_ref().as_table().ok_or_else(|| parser.mistyped("host", value, "tables [host.\"https://…\"]"))?;
                hosts.extend(table.iter());
            }
            _ => {}
        }
    }
    // As they stand in the file: the map is sorted by name.
    hosts.sort_by_key(|(key, _)| key.span().start);
    let mut found = Vec::new();
    for (key, value) in hosts {
        let name = key.get_ref();
        let table = value.get_ref().as_table().ok_or_else(|| parser.mistyped(&format!("host.{name:?}"), value, "a table"))?;
        let place = |overridden| place(name, overridden).map_err(|why| parser.wrong(key.span().start, &format!("host {name:?}: {why}")));
        let place = place(parser.flag(table, "override_path")?.unwrap_or(false))?;
        found.push(Host { place: Some(place), ..parser.host(&format!("host.{name:?}."), table, &[])? });
    }
    let overridden = parser.flag(document, "override_path")?.unwrap_or(false);
    let place = match server {
        "" => None,
        server => {
            Some(place(server, overridden).map_err(|why| parser.wrong(at(document, "server"), &format!("server {server:?}: {why}")))?)
        }
    };
    let root = parser.host("", document, &["server", "host"])?;
    found.push(Host { place, ..root });
    Ok((found, parser.warnings))
}

/// Where a key stands.
fn at(table: &DeTable, key: &str) -> usize {
    table.iter().find(|(k, _)| k.get_ref() == key).map_or(0, |(k, _)| k.span().start)
}

/// Takes `https://host[:port][/path]`, or the same without a scheme.
fn place(text: &str, overridden: bool) -> std::result::Result<Place, &'static str> {
    let (scheme, rest) = match text.split_once("://") {
        Some(("https", rest)) => ("https", rest),
        Some(("http", rest)) => ("http", rest),
        Some(_) => return Err("expected http:// or https://"),
        None => ("https", text),
    };
    let (authority, path) = rest.find('/').map_or((rest, ""), |i| rest.split_at(i));
    if authority.contains('@') {
        return Err("a user name does not belong here; see [images.auth] of the daemon's configuration");
    }
    let uri: ureq::http::Uri = format!("{scheme}://{authority}/").parse().map_err(|_| "expected a host with an optional port")?;
    let whole = uri.authority().is_some_and(|a| a.as_str() == authority) && uri.path_and_query().is_some_and(|p| p.as_str() == "/");
    super::url::origin(&uri).filter(|_| whole).ok_or("expected a host with an optional port")?;
    if !path
        .bytes()
        .all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}'))
    {
        return Err("the path may have neither a query nor a fragment nor odd characters");
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    if !overridden && parts.last() != Some(&"v2") {
        parts.push("v2");
    }
    let path = parts.iter().map(|part| format!("/{part}")).collect();
    Ok(Place { scheme, authority: authority.to_owned(), path })
}

struct Parser<'a> {
    text: &'a str,
    dir: &'a Path,
    warnings: Vec<String>,
}

impl Parser<'_> {
    fn line(&self, start: usize) -> usize {
        self.text.as_bytes()[..start.min(self.text.len())].iter().filter(|b| **b == b'\n').count() + 1
    }

    fn wrong(&self, start: usize, what: &str) -> Error {
        Error::precondition(format!("line {}: {}", self.line(start), what.trim_end().replace('\n', "; ")))
    }

    fn mistyped(&self, key: &str, value: &Spanned<DeValue>, want: &str) -> Error {
        self.wrong(value.span().start, &format!("{key}: expected {want}, found {}", value.get_ref().type_str()))
    }

    fn string<'v>(&self, key: &str, value: &'v Spanned<DeValue>) -> Result<&'v str> {
        value.get_ref().as_str().ok_or_else(|| self.mistyped(key, value, "a string"))
    }

    fn flag(&self, table: &DeTable, key: &str) -> Result<Option<bool>> {
        let Some((_, value)) = table.iter().find(|(k, _)| k.get_ref() == key) else { return Ok(None) };
        value.get_ref().as_bool().map(Some).ok_or_else(|| self.mistyped(key, value, "true or false"))
    }

    /// A string or a list of strings.
    fn strings(&self, key: &str, value: &Spanned<DeValue>) -> Result<Vec<String>> {
        if let Some(one) = value.get_ref().as_str() {
            return Ok(vec![one.to_owned()]);
        }
        let list = value.get_ref().as_array().ok_or_else(|| self.mistyped(key, value, "a string or a list of strings"))?;
        list.iter().map(|item| self.string(key, item).map(str::to_owned)).collect()
    }

    /// The keys of one host; `known` are those of the level above that stand beside them.
    fn host(&mut self, prefix: &str, table: &DeTable, known: &[&str]) -> Result<Host> {
        let mut host = Host::default();
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let full = format!("{prefix}{name}");
            match name {
                "capabilities" => self.capabilities(&full, value, &mut host)?,
                "ca" => host.tls.ca = self.strings(&full, value)?.iter().map(|p| self.dir.join(p)).collect(),
                "client" => host.tls.client = self.client(&full, value)?,
                "skip_verify" => host.tls.skip_verify = self.flag(table, name)?,
                "override_path" => drop(self.flag(table, name)?),
                "header" => host.headers = self.headers(&full, value)?,
                "dial_timeout" => {
                    let text = self.string(&full, value)?;
                    let why = || self.wrong(value.span().start, &format!("{full}: expected a duration such as 5s, found {text:?}"));
                    host.dial_timeout = Some(duration(text).filter(|d| !d.is_zero()).ok_or_else(why)?);
                }
                _ if known.contains(&name) => {}
                _ => self.warnings.push(format!("line {}: {full} is not known and left out", self.line(key.span().start))),
            }
        }
        Ok(host)
    }

    fn capabilities(&self, key: &str, value: &Spanned<DeValue>, host: &mut Host) -> Result<()> {
        let list = value.get_ref().as_array().ok_or_else(|| self.mistyped(key, value, "a list of pull, resolve, push"))?;
        if list.is_empty() {
            return Ok(());
        }
        (host.pull, host.resolve) = (false, false);
        for item in list.iter() {
            match self.string(key, item)?.to_ascii_lowercase().as_str() {
                "pull" => host.pull = true,
                "resolve" => host.resolve = true,
                "push" => {}
                other => return Err(self.wrong(item.span().start, &format!("{key}: expected pull, resolve or push, found {other:?}"))),
            }
        }
        Ok(())
    }

    /// `"file"`, `["file", …]` or `[["certificate", "key"], …]`.
    fn client(&self, key: &str, value: &Spanned<DeValue>) -> Result<Vec<(PathBuf, Option<PathBuf>)>> {
        const WANT: &str = "a file, a list of files, or a list of pairs [certificate, key]";
        if let Some(one) = value.get_ref().as_str() {
            return Ok(vec![(self.dir.join(one), None)]);
        }
        let list = value.get_ref().as_array().ok_or_else(|| self.mistyped(key, value, WANT))?;
        let one = |item: &Spanned<DeValue>| match (item.get_ref().as_str(), item.get_ref().as_array()) {
            (Some(file), _) => Ok((self.dir.join(file), None)),
            (_, Some(_)) => match self.strings(key, item)?.as_slice() {
                [certificate, file] => Ok((self.dir.join(certificate), Some(file).filter(|f| !f.is_empty()).map(|f| self.dir.join(f)))),
                pair => Err(self.wrong(item.span().start, &format!("{key}: expected a pair, found {} strings", pair.len()))),
            },
            _ => Err(self.mistyped(key, item, WANT)),
        };
        list.iter().map(one).collect()
    }

    fn headers(&self, key: &str, value: &Spanned<DeValue>) -> Result<Vec<(String, Secret)>> {
        let table = value.get_ref().as_table().ok_or_else(|| self.mistyped(key, value, "a table"))?;
        let mut found = Vec::new();
        for (name, value) in table {
            let (full, lower) = (format!("{key}.{}", name.get_ref()), name.get_ref().to_ascii_lowercase());
            // What the protocol itself needs: changed, it would garble the connection.
            let own = ["host", "content-length", "transfer-encoding", "connection", "range", "accept-encoding"].contains(&lower.as_str());
            if own || ureq::http::HeaderName::from_bytes(lower.as_bytes()).is_err() {
                return Err(self.wrong(name.span().start, &format!("{full}: this header cannot be set")));
            }
            for text in self.strings(&full, value)? {
                ureq::http::HeaderValue::from_str(&text)
                    .map_err(|_| self.wrong(value.span().start, &format!("{full}: not the value of a header")))?;
                found.push((lower.clone(), Secret(text)));
            }
        }
        Ok(found)
    }
}

/// Durations as Go writes them: `5s`, `1m30s`, `1.5h`, `300ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = 0.0;
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let end = rest[digits..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |i| digits + i);
        let unit = match &rest[digits..end] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        sum += number * unit;
        rest = &rest[end..];
    }
    Duration::try_from_secs_f64(sum).ok().filter(|d| *d <= Duration::from_secs(86400))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(text: &str) -> Vec<Host> {
        let (hosts, warnings) = parse(text, Path::new("/d")).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        hosts
    }

    fn at_place(scheme: &'static str, authority: &str, path: &str) -> Option<Place> {
        Some(Place { scheme, authority: authority.to_owned(), path: path.to_owned() })
    }

    #[test]
    fn everything_in_the_order_of_the_file() {
        let hosts = good(
            r#"
server = "https://registry.io"
ca = "own.crt"
[host."https://z.io".header]
Authorization = "Basic x"
x-many = ["a", "b"]
[host."https://z.io"]
capabilities = ["Pull"]
ca = ["/a.crt", "b.crt"]
client = [["c.cert", "c.key"], ["d.pem", ""], "e.pem"]
skip_verify = true
dial_timeout = "1m1.5s"
[host."http://a.io:5000/mirror/v2/"]
client = "f.pem"
capabilities = ["pull", "resolve", "push"]
[host."b.io/api"]
override_path = true
capabilities = ["push"]
"#,
        );
        assert_eq!(hosts.len(), 4);
        assert_eq!(hosts[0].place, at_place("https", "z.io", "/v2"));
        assert!(hosts[0].pull && !hosts[0].resolve);
        assert_eq!(hosts[0].tls.ca, [Path::new("/a.crt"), Path::new("/d/b.crt")]);
        let key = |p: &str| Some(PathBuf::from(p));
        let client = [("/d/c.cert".into(), key("/d/c.key")), ("/d/d.pem".into(), None), ("/d/e.pem".into(), None)];
        assert_eq!(hosts[0].tls.client, client);
        assert_eq!((hosts[0].tls.skip_verify, hosts[0].dial_timeout), (Some(true), Some(Duration::from_millis(61500))));
        let headers: Vec<_> = hosts[0].headers.iter().map(|(k, v)| (k.as_str(), v.0.as_str())).collect();
        assert_eq!(headers, [("authorization", "Basic x"), ("x-many", "a"), ("x-many", "b")]);
        assert!(!format!("{:?}", hosts[0]).contains("Basic"));
        assert_eq!(hosts[1].place, at_place("http", "a.io:5000", "/mirror/v2"));
        assert_eq!(hosts[1].tls.client, [("/d/f.pem".into(), None)]);
        assert_eq!(hosts[2].place, at_place("https", "b.io", "/api"));
        assert!(!hosts[2].pull && !hosts[2].resolve);
        assert_eq!(hosts[3].place, at_place("https", "registry.io", "/v2"));
        assert_eq!(hosts[3].tls.ca, [Path::new("/d/own.crt")]);
    }

    #[test]
    fn without_a_server_the_registry_itself() {
        assert_eq!(good("skip_verify = false").pop().unwrap().tls.skip_verify, Some(false));
        let hosts = good("[host.\"https://[::1]:5000\"]\n");
        assert_eq!(hosts[0].place, at_place("https", "[::1]:5000", "/v2"));
        assert_eq!(hosts[1], Host::default());
        assert_eq!(good("server = \"r.io/a/../v2\"")[0].place, at_place("https", "r.io", "/v2"));
    }

    #[test]
    fn errors_name_line_and_key() {
        for (text, words) in [
            ("server = 3", "line 1: server: expected a string, found integer"),
            ("\n[host]\n\"https://a\" = 1", "line 3: host.\"https://a\": expected a table"),
            ("[host.\"ftp://a\"]", "line 1: host \"ftp://a\": expected http"),
            ("[host.\"https://u:p@a\"]", "line 1: host \"https://u:p@a\": a user name"),
            ("[host.\"https://a?x\"]", "expected a host"),
            ("[host.\"https://a/b?x\"]", "neither a query"),
            ("server = \"https://\"", "line 1: server \"https://\": expected a host"),
            (
                "[host.\"https://a\"]\ncapabilities = [\"fly\"]",
                "line 2: host.\"https://a\".capabilities: expected pull, resolve or push, found \"fly\"",
            ),
            ("ca = [1]", "ca: expected a string, found integer"),
            ("client = [[\"a\"]]", "client: expected a pair, found 1 strings"),
            ("client = 1", "client: expected a file"),
            ("skip_verify = \"yes\"", "skip_verify: expected true or false, found string"),
            ("dial_timeout = \"5\"", "dial_timeout: expected a duration such as 5s"),
            ("dial_timeout = \"0s\"", "dial_timeout: expected a duration"),
            ("[header]\nhost = \"a\"", "line 2: header.host: this header cannot be set"),
            ("[header]\nx = \"a\\nb\"", "line 2: header.x: not the value"),
            ("a = = 1", "line 1: "),
        ] {
            let e = parse(text, Path::new("/d")).unwrap_err();
            assert!(e.message().contains(words), "{text:?}: {e}");
        }
    }

    #[test]
    fn unknown_keys_are_warned_about() {
        let (hosts, warnings) = parse("x = 1\n[host.\"https://a\"]\ncapability = []", Path::new("/d")).unwrap();
        assert_eq!(hosts.len(), 2);
        assert_eq!(warnings, ["line 3: host.\"https://a\".capability is not known and left out", "line 1: x is not known and left out"]);
    }

    #[test]
    fn directories_and_dockers_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let last = |registry: &str| load(root.path(), registry).unwrap().pop().unwrap().place;
        assert_eq!(last("a.io"), None);
        write("_default/hosts.toml", "server = \"d.io\"");
        write("a.io_5000_/hosts.toml", "server = \"one.io\"");
        write("a.io:5000/hosts.toml", "server = \"two.io\"");
        write("a.io:6000/hosts.toml", "server = \"three.io\"");
        write("[::1]_5000_/hosts.toml", "server = \"four.io\"");
        for (registry, server) in
            [("a.io:5000", "one.io"), ("a.io:6000", "three.io"), ("[::1]:5000", "four.io"), ("a.io", "d.io"), ("..", "d.io")]
        {
            assert_eq!(last(registry), at_place("https", server, "/v2"), "{registry}");
        }
        write("e.io/z.crt", "");
        write("e.io/c.cert", "");
        write("e.io/c.key", "");
        write("e.io/alone.cert", "");
        let dir = root.path().join("e.io");
        let tls = tls_of(root.path(), "e.io").unwrap();
        assert_eq!(tls.ca, [dir.join("z.crt")]);
        assert_eq!(tls.client, [(dir.join("alone.cert"), None), (dir.join("c.cert"), Some(dir.join("c.key")))]);
        assert!(tls_of(root.path(), "f.io").unwrap().is_empty(), "_default is for registries alone");
        write("f.io/hosts.toml", "server = [");
        let e = load(root.path(), "f.io").unwrap_err();
        assert!(e.message().contains("f.io/hosts.toml: line 1: "), "{e}");
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1h2m3s4ms"), Some(Duration::from_millis(3_723_004)));
        assert_eq!(duration("0.5us"), Some(Duration::from_nanos(500)));
        for bad in ["", "5", "s", "5x", "1.2.3s", "-1s", "99999h", "5 s"] {
            assert_eq!(duration(bad), None, "{bad:?}");
        }
    }
}
