//! Sizes of the client's terminal: JSON documents, several in one piece or one in several.

use serde::Deserialize;

/// Longest document that may be unfinished, bytes.
const LIMIT: usize = 4096;

/// In characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Size {
    #[serde(rename = "Width", alias = "width")]
    pub width: u16,
    #[serde(rename = "Height", alias = "height")]
    pub height: u16,
}

/// Collects bytes until they are a size.
#[derive(Default)]
pub struct Sizes {
    part: Vec<u8>,
}

impl Sizes {
    /// The last size that these bytes complete: those before it are out of date. What is no size is dropped.
    pub fn push(&mut self, bytes: &[u8]) -> Option<Size> {
        let mut last = None;
        for piece in bytes.chunks(LIMIT) {
            self.part.extend_from_slice(piece);
            let mut documents = serde_json::Deserializer::from_slice(&self.part).into_iter::<Size>();
            let mut used = 0;
            let broken = loop {
                match documents.next() {
                    Some(Ok(size)) => {
                        last = Some(size);
                        used = documents.byte_offset();
                    }
                    Some(Err(e)) => break !e.is_eof(),
                    None => {
                        used = self.part.len();
                        break false;
                    }
                }
            };
            self.part.drain(..used);
            if broken || self.part.len() > LIMIT {
                self.part.clear();
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_piles() {
        let size = |width, height| Some(Size { width, height });
        let mut sizes = Sizes::default();
        assert_eq!(sizes.push(b"{\"Width\":80,\"Height\":24}\n"), size(80, 24));
        assert_eq!(sizes.push(b"{\"Width\":1,\"Height\":2}{\"Width\":3,\"Height\":4}\n{\"Wid"), size(3, 4));
        assert_eq!(sizes.push(b"th\":5"), None);
        assert_eq!(sizes.push(b",\"Height\":6}"), size(5, 6));
        assert_eq!(sizes.push(b"garbage"), None);
        assert_eq!(sizes.push(b"{\"Width\":99999999,\"Height\":6}"), None);
        assert_eq!(sizes.push(b"{\"width\":7,\"height\":8}"), size(7, 8));
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_pile_up(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..20000), open in 0usize..10000) {
            let mut sizes = Sizes::default();
            sizes.push("{\"Width\":[".repeat(open / 10).as_bytes());
            sizes.push(&bytes);
            assert!(sizes.part.len() <= LIMIT);
        }
    }
}
